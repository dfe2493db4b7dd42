//! One vCPU and the thread that runs it.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::signal::Killable;

use super::gate::Gate;
use super::kick::{self, RunPage};
use super::state::second_handle;
use super::{EntryPoint, HostCpuid, StateShape, Topology, VcpuStateV1, msrs};
use crate::config::MsrChange;
use crate::observe::Exits;
use crate::threads::{self, Kind};

#[derive(Debug, Error)]
pub enum CpuError {
    #[error("KVM could not {what}")]
    Kvm { what: &'static str, source: io::Error },
    #[error("the CPUID table is larger than KVM takes")]
    CpuidEntries,
    #[error("the CPU configuration changes CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which KVM does not have here")]
    NoCpuid { leaf: u32, subleaf: u32 },
    #[error("the CPU configuration changes MSR {index:#x}, which KVM does not have here")]
    NoMsr { index: u32 },
    #[error("KVM does not take {value:#x} for MSR {index:#x}, as the CPU configuration would have it")]
    MsrValue { index: u32, value: u64 },
    #[error("{0} bytes of FPU state are more than this host's KVM takes")]
    XsaveSize(usize),
    #[error("the list of MSRs is larger than KVM takes")]
    MsrEntries,
    #[error("this host's KVM refuses MSR {index:#x} with value {value:#x}")]
    Msr { index: u32, value: u64 },
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
    /// Of vCPUs that are being paused, the last one has left the guest.
    fn all_parked(&self);
}

/// A vCPU that does not run yet.
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    cpuid: Arc<CpuId>,
    pub(super) exits: Arc<Exits>,
}

impl Vcpu {
    /// Creates vCPU `id`, with its CPUID and MSRs; the first one gets the entry point's registers.
    pub fn new(vm: &VmFd, cpuid: &HostCpuid, id: u8, topology: Topology, msrs: &[MsrChange]) -> Result<Self, CpuError> {
        let fd = vm.create_vcpu(id.into()).map_err(CpuError::at("create a vCPU"))?;
        let cpuid = Arc::new(cpuid.for_vcpu(id, topology)?);
        fd.set_cpuid2(&cpuid).map_err(CpuError::at("set CPUID"))?;
        msrs::change_msrs(&fd, msrs)?;
        msrs::set_boot_msrs(&fd)?;
        Ok(Self { fd, id, cpuid, exits: Arc::default() })
    }

    /// Creates vCPU `id` as it was saved.
    pub fn restore(vm: &VmFd, state: &VcpuStateV1, shape: &StateShape, id: u8) -> Result<Self, CpuError> {
        let fd = vm.create_vcpu(id.into()).map_err(CpuError::at("create a vCPU"))?;
        let cpuid = Arc::new(state.restore(&fd, shape)?);
        Ok(Self { fd, id, cpuid, exits: Arc::default() })
    }

    /// What it is, while it has no thread.
    pub(super) fn save(&self, shape: &StateShape) -> Result<VcpuStateV1, CpuError> {
        VcpuStateV1::save(&self.fd, &self.cpuid, shape)
    }

    pub fn enter_at(&self, entry: &EntryPoint) -> Result<(), CpuError> {
        entry.load_registers(&self.fd)
    }

    /// Starts the vCPU's thread, called `thread` and its number.
    pub(super) fn start(
        mut self,
        thread: &str,
        handler: Arc<dyn ExitHandler>,
        gate: Arc<Gate>,
    ) -> Result<VcpuHandle, CpuError> {
        let id = self.id;
        let page = RunPage::of(&mut self.fd);
        let (fd, cpuid) = (self.fd.as_raw_fd(), self.cpuid.clone());
        // The vCPU travels into the thread and back out through the handle's join, which keeps its page mapped
        // for as long as the handle may kick it.
        let run = move || {
            // A panic must not unmap the page either, where it unwinds.
            let mut vcpu = ManuallyDrop::new(self);
            vcpu.run(page, &*handler, &gate);
            gate.leave(|| handler.all_parked());
            ManuallyDrop::into_inner(vcpu)
        };
        let thread = threads::spawn(Kind::Vcpu, &format!("{thread}{id}"), Some(STACK), run)
            .map_err(|source| CpuError::Thread { id, source })?;
        Ok(VcpuHandle { thread: Some(thread), page, fd, cpuid })
    }

    fn run(&mut self, page: RunPage, handler: &dyn ExitHandler, gate: &Gate) {
        if gate.is_closed() {
            self.come_by(page, handler, gate);
        }
        if self.id == 0 && !gate.is_shut() {
            handler.first_entry();
        }
        while !gate.is_shut() {
            match self.fd.run() {
                // `rep outs` and `rep ins` come as one exit with many elements for the same port.
                Ok(VcpuExit::IoOut(port, data)) => {
                    self.exits.port_writes.count();
                    data.chunks(page.port_access_size()).for_each(|element| handler.port_write(port, element));
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.exits.port_reads.count();
                    data.chunks_mut(page.port_access_size()).for_each(|element| handler.port_read(port, element));
                }
                Ok(VcpuExit::MmioRead(addr, data)) => {
                    self.exits.mmio_reads.count();
                    handler.mmio_read(addr, data);
                }
                Ok(VcpuExit::MmioWrite(addr, data)) => {
                    self.exits.mmio_writes.count();
                    handler.mmio_write(addr, data);
                }
                Ok(VcpuExit::Shutdown) => return handler.shutdown(),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return handler.fault(VcpuFault::Entry { id: self.id, reason });
                }
                Ok(VcpuExit::InternalError) => {
                    self.exits.failures.count();
                    return handler.fault(self.internal_error(page));
                }
                // A kick, or a signal of the host's. What it came from is finished in the guest's eyes: KVM looks for
                // a kick after it has taken in the result of the exit before. (KVM API, 5: immediate_exit.)
                Ok(VcpuExit::Intr) => self.come_by(page, handler, gate),
                Err(error) if error.errno() == libc::EINTR => self.come_by(page, handler, gate),
                // It was halted before its first instruction, and is not any more.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Ok(other) => {
                    let exit = format!("{other:?}");
                    return handler.fault(VcpuFault::Unknown { id: self.id, exit });
                }
                Err(error) => return handler.fault(VcpuFault::Run { id: self.id, error }),
            }
        }
    }

    /// Waits if the VM is paused.
    fn come_by(&self, page: RunPage, handler: &dyn ExitHandler, gate: &Gate) {
        if gate.pass(|| page.clear_immediate_exit(), || handler.all_parked()) {
            // Keeps the guest's watchdogs from taking the pause for a hang. A guest without KVM's clock has no way to
            // be told so, which is an error here and nobody's fault.
            let _ = self.fd.kvmclock_ctrl();
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

/// A running vCPU. Dropping it waits for its end, which it has to have been asked for.
pub struct VcpuHandle {
    thread: Option<JoinHandle<Vcpu>>,
    page: RunPage,
    /// Open until the thread has been joined, as the page is mapped.
    fd: RawFd,
    cpuid: Arc<CpuId>,
}

impl VcpuHandle {
    /// Gets the vCPU out of the guest, to look at its gate; does not wait for that.
    pub fn kick(&self) {
        self.page.set_immediate_exit();
        if let Some(thread) = &self.thread {
            // It fails when the thread has ended, which is what is wanted.
            let _ = thread.kill(kick::kick_signal());
        }
    }
}

impl VcpuHandle {
    /// What it is, while its thread waits outside of the guest.
    pub fn save(&self, vm: &VmFd, shape: &StateShape) -> Result<VcpuStateV1, CpuError> {
        VcpuStateV1::save(&second_handle(vm, self.fd)?, &self.cpuid, shape)
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panicked vCPU thread has said so already.
            drop(thread.join());
        }
    }
}
