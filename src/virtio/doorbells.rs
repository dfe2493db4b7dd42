//! Notifications that reach a device without an exit to us.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Whoever listens to the guest's writes for us.
pub trait Doorbells: Send + Sync {
    /// Signals `fd` on each guest write to `addr`; given a `value`, only if 4 bytes of just that value are written.
    fn attach_doorbell(&self, addr: u64, value: Option<u32>, fd: &EventFd) -> io::Result<()>;
    fn detach_doorbell(&self, addr: u64, value: Option<u32>, fd: &EventFd);
}
