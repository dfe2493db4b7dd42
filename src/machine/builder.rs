//! From opened parts to a machine that waits for its start.
//!
//! The order is the cheap one: memory slots first (each costs a grace period once interrupt routes exist), then
//! the interrupt controllers, the kernel, the devices, and the vCPUs at the end.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_API_VERSION, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Machine;
use super::board::{Board, News};
use super::devices::{self, Devices, Opened};
use super::error::{KvmError, MachineError};
use super::events::EventQueue;
use super::lifecycle::State;
use super::limits::Limits;
use super::pager::Pager;
use super::parts::{OpenNic, Origin, Parts, SavedMemory, SerialSetup};
use super::saved::MachineStateV1;
use crate::backend::{HostFile, HostFiles};
use crate::boot::{self, BootSource};
use crate::config::{CpuChanges, MemoryPages, MsrChange, check_size, check_threads};
use crate::cpu::{self, EntryPoint, HostCpuid, StateShape, Topology, Vcpu, Vcpus};
use crate::memory::{self, Ram};
use crate::observe::{Milestone, Timeline};
use crate::platform::acpi::{self, AcpiConfig, AcpiError, PciTables};
use crate::platform::bus::{Bus, shared};
use crate::platform::events::EventDevice;
use crate::platform::interrupts::Interrupts;
use crate::platform::serial::{SerialDevice, SerialPort};
use crate::platform::{EventSink, events, generation, layout, power};

impl Machine {
    /// Builds a machine: everything is loaded and ready when this returns. One that was saved is paused then, as it was.
    ///
    /// # Errors
    /// The first thing that is wrong; nothing is left behind then.
    pub fn build(parts: Parts, host: &dyn HostFiles, timeline: &Arc<Timeline>) -> Result<Self, MachineError> {
        let device_count = parts.devices();
        let (cpus, memory) = (parts.cpus, parts.memory);
        check_size(cpus, memory, device_count)?;
        check_threads(cpus, parts.threads_per_core)?;
        parts.memory_pages.check(memory)?;
        let topology = Topology { cpus, threads_per_core: parts.threads_per_core };
        let changes = parts.cpu_changes;
        let (logs_writes, memory_policy) = (parts.track_writes, parts.memory_policy);
        let Parts { origin, disks, nics, budgets, entropy, serial, transport, vcpu_thread, .. } = parts;
        let kvm = open_kvm(host, cpus, &changes)?;
        let vm = Arc::new(create_vm(&kvm).map_err(KvmError::call("create a VM"))?);
        timeline.mark(Milestone::VmCreated);

        let ranges = layout::ram_ranges(memory.0);
        let ram = match (&origin, parts.memory_pages) {
            (Origin::Kernel { .. }, MemoryPages::Transparent) => memory::anonymous(&ranges)?,
            (Origin::Kernel { .. }, MemoryPages::Huge) => memory::huge_pages(&ranges)?,
            (Origin::Saved { memory: SavedMemory::File(file), .. }, _) => memory::saved::map(file, &ranges)?,
            (Origin::Saved { memory: SavedMemory::Pager(_), .. }, _) => memory::small_pages(&ranges)?,
        };
        memory::policy::apply(&ram, memory_policy)?;
        map_memory(&vm, &ram, logs_writes)?;
        timeline.mark(Milestone::MemoryMapped);

        create_interrupt_controllers(&vm)?;
        let cpuid = HostCpuid::new(&kvm, &changes.cpuid)?;
        let events = Arc::new(EventQueue::new().map_err(MachineError::host("make an event queue"))?);
        let Begun { vcpus, window_64, saved, pager } = match origin {
            Origin::Kernel { kernel, initrd, cmdline } => {
                let source = BootSource { kernel, initrd, cmdline, rsdp: layout::ACPI };
                let entry = boot::load(&ram, &source, &host.kernel_cache())?;
                timeline.mark(Milestone::KernelLoaded);
                let window_64 = layout::pci_window_64(cpuid.physical_address_bits());
                let pci = devices::has_pci(transport).then_some(PciTables { window_64 });
                let virtio_mmio = devices::mmio_places(transport, device_count);
                acpi::write(&ram, &AcpiConfig { cpus: cpus.into(), pci, virtio_mmio })?;
                power::write_reset_vector(&ram).map_err(AcpiError::from)?;
                generation::renew(&ram).map_err(MachineError::host("make a generation ID"))?;
                Begun {
                    vcpus: create_vcpus(&vm, &cpuid, topology, &changes.msrs, &entry)?,
                    window_64,
                    saved: None,
                    pager: None,
                }
            }
            Origin::Saved { state, memory, clock } => {
                state.check(cpus, &cpuid)?;
                // KVM will look at it from here on.
                let pager = match memory {
                    SavedMemory::File(_) => None,
                    SavedMemory::Pager(open) => Some(open.hand_over(&ram, &events)?),
                };
                let vcpus = restore_vcpus(&kvm, &vm, &state)?;
                // What the chips hold goes to LAPICs that are there, and what devices have to tell, to chips.
                state.chips.0.restore(&vm, clock).map_err(KvmError::call("set its interrupt controllers and clock"))?;
                Begun { vcpus, window_64: state.pci_window_64, saved: Some(state), pager }
            }
        };

        let news = Arc::new(News { events: events.clone(), timeline: timeline.clone() });
        let board = Arc::new(Board { ports: Bus::default(), mmio: Arc::default(), news: news.clone() });
        let interrupts = Arc::new(Interrupts::new(vm.clone()));
        let (event_device, serial) = attach_platform(&board, &news, &interrupts, serial, timeline, saved.as_deref())?;
        let generation_id = saved.as_ref().is_none_or(|state| state.generation_id);
        if saved.is_some() && generation_id {
            generation::renew(&ram).map_err(MachineError::host("make a generation ID"))?;
            event_device.lock().unwrap_or_else(PoisonError::into_inner).generation_changed();
        }
        let limits = Limits::of(&disks, &nics).within(budgets)?;
        let knows_writes = logs_writes && !nics.iter().any(OpenNic::writes_behind_our_back);
        let opened = Opened { disks, nics, entropy };
        let devices = match &saved {
            None => Devices::attach(opened, transport, &ram, &board, &interrupts, window_64)?,
            Some(state) => Devices::restore(opened, &state.devices.0, transport, &ram, &board, &interrupts, window_64)?,
        };

        cpu::install_kick_handler().map_err(|e| KvmError::call("install its signal handler")(e))?;
        timeline.mark(Milestone::DevicesReady);
        let mut machine = Self {
            state: State::Built,
            vcpu_thread,
            memory_policy,
            vcpus: Vcpus::new(vcpus),
            board,
            event_device,
            serial,
            events,
            devices,
            limits,
            knows_writes,
            generation_id,
            window_64,
            transport,
            kvm,
            vm,
            pager,
            ram,
        };
        if let Some(saved) = saved {
            machine.state = State::Paused { stopping: saved.stopping };
            machine.vcpus.start_paused(machine.vcpu_thread, &machine.exit_handler())?;
        }
        Ok(machine)
    }
}

/// Where a machine stands before it has devices.
struct Begun {
    vcpus: Vec<Vcpu>,
    window_64: Option<(u64, u64)>,
    saved: Option<Box<MachineStateV1>>,
    pager: Option<Pager>,
}

/// What the machine cannot do without.
const CAPABILITIES: [(Cap, &str); 8] = [
    (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
    (Cap::Irqchip, "the in-kernel interrupt controllers (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "the in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::Ioeventfd, "doorbells (KVM_CAP_IOEVENTFD)"),
    (Cap::IrqRouting, "message-signalled interrupts (KVM_CAP_IRQ_ROUTING)"),
    (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
    (Cap::ExtCpuid, "CPUID (KVM_CAP_EXT_CPUID)"),
    (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
];

/// Is there a KVM that can be what a VM needs? Tells how many vCPUs a VM can have at most.
///
/// # Errors
/// What is wrong with it.
pub fn look_at_kvm(host: &dyn HostFiles) -> Result<usize, KvmError> {
    open_kvm(host, 1, &CpuChanges::default()).map(|kvm| kvm.get_max_vcpus())
}

fn open_kvm(host: &dyn HostFiles, cpus: u8, changes: &CpuChanges) -> Result<Kvm, KvmError> {
    let file = host.open(&HostFile::Kvm).map_err(|error| match error.kind() {
        // ENODEV and ENXIO: a node without a driver behind it.
        _ if [Some(libc::ENODEV), Some(libc::ENXIO)].contains(&error.raw_os_error()) => KvmError::Missing(error),
        std::io::ErrorKind::NotFound => KvmError::Missing(error),
        std::io::ErrorKind::PermissionDenied => KvmError::Permission(error),
        _ => KvmError::Open(error),
    })?;
    let kvm = kvm_of(file);
    let version = kvm.get_api_version();
    if version < 0 {
        return Err(KvmError::NotKvm(std::io::Error::last_os_error()));
    }
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Version(version));
    }
    check_capabilities(changes, |number| kvm.check_extension_raw(number.into()) > 0)?;
    let max = kvm.get_max_vcpus();
    if usize::from(cpus) > max {
        return Err(KvmError::Cpus { wanted: cpus, max });
    }
    Ok(kvm)
}

/// KVM gives up on a new VM as soon as anything waits for the thread, be it work that an io_uring of a machine before has left.
pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            created => return created,
        }
    }
}

#[expect(unsafe_code, reason = "kvm-ioctls takes a raw descriptor")]
fn kvm_of(file: File) -> Kvm {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is open and its ownership passes on.
    unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
}

/// Looks for what we cannot do without, unless the user knows better, and for what the user cannot.
fn check_capabilities(changes: &CpuChanges, has: impl Fn(u32) -> bool) -> Result<(), KvmError> {
    let ours = CAPABILITIES.into_iter().map(|(cap, name)| (cap as u32, name));
    let mut wanted = ours.filter(|(number, _)| !changes.dispensable.contains(number));
    if let Some((_, name)) = wanted.find(|(number, _)| !has(*number)) {
        return Err(KvmError::Capability(name));
    }
    match changes.required.iter().find(|number| !has(**number)) {
        Some(&number) => Err(KvmError::WantedCapability(number)),
        None => Ok(()),
    }
}

#[expect(unsafe_code, reason = "KVM is handed raw addresses")]
fn map_memory(vm: &VmFd, ram: &Ram, logs_writes: bool) -> Result<(), KvmError> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if logs_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is as long as said, and the machine drops it after its last vCPU.
        unsafe { vm.set_user_memory_region(slot) }.map_err(KvmError::call("map guest memory"))?;
    }
    Ok(())
}

fn create_interrupt_controllers(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(KvmError::call("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(KvmError::call("place its TSS"))?;
    vm.create_irq_chip().map_err(KvmError::call("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(KvmError::call("create the timer"))
}

type Platform = (Arc<Mutex<EventDevice>>, Arc<SerialPort>);

fn attach_platform(
    board: &Board,
    news: &Arc<News>,
    interrupts: &Interrupts,
    serial: SerialSetup,
    timeline: &Arc<Timeline>,
    saved: Option<&MachineStateV1>,
) -> Result<Platform, MachineError> {
    let line = |gsi| interrupts.line(gsi).map_err(MachineError::host("make an interrupt line"));
    let saved_serial = saved.map(|state| &state.serial.0);
    let serial = SerialPort::new(line(layout::SERIAL_GSI)?, serial.0, timeline.clone(), saved_serial);
    let serial = Arc::new(serial.map_err(MachineError::host("make the serial port"))?);
    let events = news.events.clone();
    let on_eject = Box::new(move |slot: u8| events.ejected(slot.into()));
    let mut event_device = EventDevice::new(line(layout::EVENT_GSI)?, on_eject);
    if let Some(state) = saved {
        event_device.restore(state.event_device.0);
    }
    let event_device = Arc::new(Mutex::new(event_device));
    let sink: Arc<dyn EventSink> = news.clone();
    let placed = power::attach(&board.ports, &board.mmio, &sink)
        && board.ports.insert(layout::SERIAL_PORT.into(), 8, shared(SerialDevice(serial.clone())))
        && board.mmio.insert(layout::EVENT_DEVICE, events::REGISTERS_SIZE, event_device.clone());
    assert!(placed, "the platform's places do not overlap");
    Ok((event_device, serial))
}

fn create_vcpus(
    vm: &VmFd,
    cpuid: &HostCpuid,
    topology: Topology,
    msrs: &[MsrChange],
    entry: &EntryPoint,
) -> Result<Vec<Vcpu>, MachineError> {
    let vcpus = (0..topology.cpus).map(|id| Vcpu::new(vm, cpuid, id, topology, msrs)).collect::<Result<Vec<_>, _>>()?;
    vcpus[0].enter_at(entry)?;
    Ok(vcpus)
}

fn restore_vcpus(kvm: &Kvm, vm: &VmFd, state: &MachineStateV1) -> Result<Vec<Vcpu>, MachineError> {
    let shape = StateShape::new(kvm, vm)?;
    let vcpus = (0..).zip(&state.vcpus).map(|(id, vcpu)| Vcpu::restore(vm, &vcpu.0, &shape, id));
    Ok(vcpus.collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_capability_is_named() {
        assert!(check_capabilities(&CpuChanges::default(), |_| true).is_ok());
        for (missing, name) in CAPABILITIES {
            let has = |number| number != missing as u32;
            let error = check_capabilities(&CpuChanges::default(), has).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            let without = CpuChanges { dispensable: vec![missing as u32], ..Default::default() };
            assert!(check_capabilities(&without, has).is_ok(), "the user can do without {name}");
        }
        let more = CpuChanges { required: vec![1, 4711], dispensable: vec![56], ..Default::default() };
        let error = check_capabilities(&more, |number| number != 4711).unwrap_err();
        assert_eq!(error.to_string(), "this host's KVM lacks capability 4711, which the CPU configuration asks for");
    }
}
