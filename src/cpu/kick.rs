//! Getting a vCPU thread out of `KVM_RUN`, without a race.
//!
//! `KVM_RUN` returns at once while `immediate_exit` is set in the vCPU's shared page (KVM API, 5). The kicker
//! sets it, then sends a signal whose handler does nothing: if the thread is inside, the signal gets it out; if
//! it is about to enter, the flag does.

#![expect(unsafe_code, reason = "the vCPU's page is shared with KVM and reached through a raw pointer")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The signal that interrupts `KVM_RUN`.
pub fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Makes the kick signal harmless, once per process.
pub fn install_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static DONE: AtomicBool = AtomicBool::new(false);
    if !DONE.load(Ordering::Relaxed) {
        register_signal_handler(kick_signal(), nothing)?;
        DONE.store(true, Ordering::Relaxed);
    }
    Ok(())
}

/// The page a vCPU shares with KVM (`struct kvm_run`), for what the safe interface does not reach.
///
/// It must not be used after the vCPU is dropped, which unmaps the page: the vCPU's handle owns one, and joins
/// the thread that owns the vCPU before it lets go of either.
#[derive(Clone, Copy)]
pub struct RunPage(NonNull<kvm_run>);

// SAFETY: other threads than the vCPU's only touch `immediate_exit`, atomically.
unsafe impl Send for RunPage {}

impl RunPage {
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        Self(NonNull::from(vcpu.get_kvm_run()))
    }

    /// Lets the next or the present `KVM_RUN` return; the signal is the caller's part.
    pub fn set_immediate_exit(self) {
        // SAFETY: the page is mapped (see the type); `AtomicU8` has the layout of `u8`.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        flag.store(1, Ordering::Release);
    }

    /// Takes that back.
    pub fn clear_immediate_exit(self) {
        // SAFETY: as above.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        flag.store(0, Ordering::Release);
    }

    /// Bytes of one element of the port access that `KVM_RUN` returned for; a string instruction has several.
    pub fn port_access_size(self) -> usize {
        // SAFETY: the page is mapped, KVM does not write it outside of `KVM_RUN`, and after a port exit the
        // union holds this member.
        let size = unsafe { (*self.0.as_ptr()).__bindgen_anon_1.io.size };
        usize::from(size).max(1)
    }

    /// The suberror and data of an internal error that `KVM_RUN` returned for.
    pub fn internal_error(self) -> (u32, Vec<u64>) {
        // SAFETY: as in `port_access_size`; any bit pattern is a valid value.
        let internal = unsafe { (*self.0.as_ptr()).__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        (internal.suberror, internal.data[..count].to_vec())
    }
}
