//! Getting a vCPU thread out of `KVM_RUN`, without a race.
//!
//! `KVM_RUN` returns at once while `immediate_exit` is set in the vCPU's shared page (KVM API, 5). The kicker
//! sets it, then sends a signal whose handler does nothing: if the thread is inside, the signal gets it out; if
//! it is about to enter, the flag does.

#![expect(unsafe_code, reason = "the vCPU's page is shared with KVM and reached through a raw pointer")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The signal that interrupts `KVM_RUN`.
pub fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Makes the kick signal harmless, once per process.
pub fn install_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), nothing)
}

/// The `immediate_exit` byte of one vCPU.
pub struct ExitFlag(NonNull<AtomicU8>);

// SAFETY: the byte is only touched atomically, and outlives the handle as `new` demands.
unsafe impl Send for ExitFlag {}

impl ExitFlag {
    /// The flag must not be used after `vcpu`'s page is unmapped, which is when the vCPU is dropped: the vCPU's
    /// handle owns this flag and joins the thread that owns the vCPU before it lets go of it.
    pub fn new(vcpu: &mut VcpuFd) -> Self {
        let byte = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: `AtomicU8` has the layout of `u8`; the pointer is into a live mapping and not null.
        Self(unsafe { NonNull::new_unchecked(byte.cast()) })
    }

    pub fn set(&self) {
        // SAFETY: see `new`.
        unsafe { self.0.as_ref() }.store(1, Ordering::Release);
    }
}

/// The suberror and data of a `KVM_EXIT_INTERNAL_ERROR`.
pub fn internal_error_details(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    // SAFETY: the exit reason says which member of the union is valid, and any bit pattern is a valid one.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    (internal.suberror, internal.data[..count].to_vec())
}
