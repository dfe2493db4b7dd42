//! One vCPU and the thread that runs it.

use std::io;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::signal::Killable;

use super::kick::{self, RunPage};
use super::{EntryPoint, HostCpuid, msrs};

#[derive(Debug, Error)]
pub enum CpuError {
    #[error("KVM could not {what}")]
    Kvm { what: &'static str, source: io::Error },
    #[error("the CPUID table is larger than KVM takes")]
    CpuidEntries,
    #[error("cannot start the thread of vCPU {id}")]
    Thread { id: u8, source: io::Error },
}

impl CpuError {
    pub(super) fn at(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { what, source: error.into() }
    }
}

/// Why a vCPU cannot go on: a bug of the guest, of KVM or of ours, and never an ordinary end.
#[derive(Debug, Clone, Error)]
pub enum VcpuFault {
    #[error("vCPU {id} hit an instruction KVM cannot emulate at {rip:#x} (suberror {suberror}, data {data:x?})")]
    Internal { id: u8, suberror: u32, rip: u64, data: Vec<u64> },
    #[error("vCPU {id} could not enter the guest (hardware reason {reason:#x})")]
    Entry { id: u8, reason: u64 },
    #[error("vCPU {id} stopped for an unknown reason: {exit}")]
    Unknown { id: u8, exit: String },
    #[error("running vCPU {id} failed: {error}")]
    Run { id: u8, error: kvm_ioctls::Error },
}

/// What happens outside of the guest when it touches the outside. Called on vCPU threads, many at once.
pub trait ExitHandler: Send + Sync {
    fn port_read(&self, port: u16, data: &mut [u8]);
    fn port_write(&self, port: u16, data: &[u8]);
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    fn mmio_write(&self, addr: u64, data: &[u8]);
    /// A triple fault.
    fn shutdown(&self);
    fn fault(&self, fault: VcpuFault);
    /// vCPU 0 is about to enter the guest for the first time.
    fn first_entry(&self);
}

/// A vCPU that does not run yet.
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
}

impl Vcpu {
    /// Creates vCPU `id` of `count`, with its CPUID and boot MSRs; the first one gets the entry point's registers.
    pub fn new(vm: &VmFd, cpuid: &HostCpuid, id: u8, count: u8) -> Result<Self, CpuError> {
        let fd = vm.create_vcpu(id.into()).map_err(CpuError::at("create a vCPU"))?;
        fd.set_cpuid2(&cpuid.for_vcpu(id, count)?).map_err(CpuError::at("set CPUID"))?;
        msrs::set_boot_msrs(&fd)?;
        Ok(Self { fd, id })
    }

    pub fn enter_at(&self, entry: &EntryPoint) -> Result<(), CpuError> {
        entry.load_registers(&self.fd)
    }

    /// Starts the vCPU's thread, called `thread` and its number.
    pub fn start(mut self, thread: &str, handler: Arc<dyn ExitHandler>) -> Result<VcpuHandle, CpuError> {
        let id = self.id;
        let page = RunPage::of(&mut self.fd);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        // The vCPU travels into the thread and back out through the handle's join, which keeps its page mapped
        // for as long as the handle may kick it.
        let thread = std::thread::Builder::new()
            .name(format!("{thread}{id}"))
            .stack_size(STACK)
            .spawn(move || {
                // A panic must not unmap the page either, where it unwinds.
                let mut vcpu = ManuallyDrop::new(self);
                vcpu.run(page, &*handler, &stopped);
                ManuallyDrop::into_inner(vcpu)
            })
            .map_err(|source| CpuError::Thread { id, source })?;
        Ok(VcpuHandle { thread: Some(thread), page, stop })
    }

    fn run(&mut self, page: RunPage, handler: &dyn ExitHandler, stop: &AtomicBool) {
        if self.id == 0 {
            handler.first_entry();
        }
        while !stop.load(Ordering::Acquire) {
            match self.fd.run() {
                // `rep outs` and `rep ins` come as one exit with many elements for the same port.
                Ok(VcpuExit::IoOut(port, data)) => {
                    data.chunks(page.port_access_size()).for_each(|element| handler.port_write(port, element));
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    data.chunks_mut(page.port_access_size()).for_each(|element| handler.port_read(port, element));
                }
                Ok(VcpuExit::MmioRead(addr, data)) => handler.mmio_read(addr, data),
                Ok(VcpuExit::MmioWrite(addr, data)) => handler.mmio_write(addr, data),
                Ok(VcpuExit::Shutdown) => return handler.shutdown(),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return handler.fault(VcpuFault::Entry { id: self.id, reason });
                }
                Ok(VcpuExit::InternalError) => return handler.fault(self.internal_error(page)),
                Ok(VcpuExit::Intr) => {}
                Ok(other) => {
                    let exit = format!("{other:?}");
                    return handler.fault(VcpuFault::Unknown { id: self.id, exit });
                }
                // A kick, or a signal of the host's: look at `stop` and go on.
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                Err(error) => return handler.fault(VcpuFault::Run { id: self.id, error }),
            }
        }
    }

    fn internal_error(&self, page: RunPage) -> VcpuFault {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let (suberror, data) = page.internal_error();
        VcpuFault::Internal { id: self.id, suberror, rip, data }
    }
}

/// A vCPU's frames are small; what is never touched is never paid for, but the address space is counted by limits.
const STACK: usize = 256 << 10;

/// A running vCPU.
pub struct VcpuHandle {
    thread: Option<JoinHandle<Vcpu>>,
    page: RunPage,
    stop: Arc<AtomicBool>,
}

impl VcpuHandle {
    /// Asks the vCPU to leave the guest for good; does not wait.
    pub fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.page.set_immediate_exit();
        if let Some(thread) = &self.thread {
            // It fails when the thread has ended, which is what is wanted.
            let _ = thread.kill(kick::kick_signal());
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.ask_to_stop();
        if let Some(thread) = self.thread.take() {
            // A panicked vCPU thread has said so already.
            drop(thread.join());
        }
    }
}
