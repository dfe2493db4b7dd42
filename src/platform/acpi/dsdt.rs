//! The DSDT: the devices a guest cannot find by itself (ACPI 6.4, sections 5.3 and 6).
//!
//! Processors are declared in the MADT alone: a processor device would only make the guest look for power
//! states that do not exist. PCI has no `_PRT`, as functions interrupt by MSI-X only.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name,
    NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path, ResourceTemplate, Return, Scope, Store, Uuid,
    ZERO,
};

use super::AcpiConfig;
use crate::platform::layout::{self, MmioPlace};
use crate::platform::{events, power};
use crate::virtio::mmio;

/// Integers of a DSDT of revision 2 have 64 bits.
const REVISION: u8 = 2;

pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::with_capacity(4096);
    let has_pci = config.pci.is_some();
    sleep_state(&mut aml);
    motherboard(&mut aml, has_pci);
    serial(&mut aml);
    pvpanic(&mut aml);
    event_registers(&mut aml);
    if let Some(pci) = &config.pci {
        pci_root(&mut aml, pci.window_64);
        pci_slots(&mut aml);
    }
    for (index, place) in config.virtio_mmio.iter().enumerate() {
        virtio_mmio(&mut aml, index, place);
    }
    power_button(&mut aml);
    generation_id(&mut aml);
    event_device(&mut aml, has_pci);
    super::tables::table(b"DSDT", REVISION, &aml)
}

fn path(path: &str) -> Path {
    path.into()
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(path(name), value)
}

fn hid(eisa: &str) -> Name {
    name("_HID", &EISAName::new(eisa))
}

fn resources(descriptors: Vec<&dyn Aml>) -> Name {
    name("_CRS", &ResourceTemplate::new(descriptors))
}

fn ports(first: u16, count: u8) -> IO {
    IO::new(first, first, 1, count)
}

/// A line of its own, edge triggered, active high.
fn line(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn device(aml: &mut Vec<u8>, at: &str, children: Vec<&dyn Aml>) {
    Device::new(path(at), children).to_aml_bytes(aml);
}

/// `\_S5` (section 7.4.2.6): the sleep type that means power-off.
fn sleep_state(aml: &mut Vec<u8>) {
    name("_S5_", &Package::new(vec![&power::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO])).to_aml_bytes(aml);
}

/// Keeps the guest from handing out what is decoded behind its back: ECAM (PCI firmware specification 3.3,
/// section 4.1.2 asks for it), our own pages below the PCI window, and the power ports.
fn motherboard(aml: &mut Vec<u8>, has_pci: bool) {
    let own_pages = layout::EVENT_DEVICE + layout::EVENT_DEVICE_SIZE - layout::BOOT_MARK;
    let own_pages = Memory32Fixed::new(true, layout::BOOT_MARK as u32, own_pages as u32);
    let power_ports = ports(layout::SLEEP_CONTROL_PORT, power::POWER_PORTS as u8);
    let ecam = Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32);
    let mut crs: Vec<&dyn Aml> = vec![&own_pages, &power_ports];
    if has_pci {
        crs.push(&ecam);
    }
    device(aml, "_SB_.MBRD", vec![&hid("PNP0C02"), &name("_UID", &ZERO), &resources(crs)]);
}

fn serial(aml: &mut Vec<u8>) {
    let crs = resources(vec![&ports(layout::SERIAL_PORT, 8), &line(layout::SERIAL_GSI)]);
    device(aml, "_SB_.COM1", vec![&hid("PNP0501"), &name("_UID", &ZERO), &crs]);
}

fn pvpanic(aml: &mut Vec<u8>) {
    let crs = resources(vec![&ports(layout::PVPANIC_PORT, 1)]);
    device(aml, "_SB_.PVPN", vec![&name("_HID", &"QEMU0001"), &name("_UID", &ZERO), &crs]);
}

/// The registers of [`events`], visible to every method below `\_SB`. Each is a field of its own width, so that
/// no access touches a neighbour that clears on reading.
fn event_registers(aml: &mut Vec<u8>) {
    let region = OpRegion::new(
        path("EREG"),
        OpRegionSpace::SystemMemory,
        &layout::EVENT_DEVICE,
        &(events::REGISTERS_SIZE as u32),
    );
    let fields = [*b"EVTS", *b"PCUP", *b"PCDN", *b"PCEJ"].map(|name| FieldEntry::Named(name, 32));
    let fields = Field::new(
        path("EREG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.to_vec(),
    );
    Scope::new(path("_SB_"), vec![&region, &fields]).to_aml_bytes(aml);
}

fn pci_root(aml: &mut Vec<u8>, window_64: Option<(u64, u64)>) {
    let memory = |start: u32, size: u32| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, start, start + (size - 1), None)
    };
    let buses = AddressSpace::new_bus_number(0u16, 0);
    let config_ports = ports(0xcf8, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7, None);
    let high_ports = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let window_32 = memory(layout::PCI_WINDOW as u32, layout::PCI_WINDOW_SIZE as u32);
    let window_64 = window_64
        .map(|(start, end)| AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, start, end - 1, None));
    let mut crs: Vec<&dyn Aml> = vec![&buses, &config_ports, &low_ports, &high_ports, &window_32];
    crs.extend(window_64.as_ref().map(|window| window as &dyn Aml));

    device(
        aml,
        "_SB_.PCI0",
        vec![
            &hid("PNP0A08"),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &ZERO),
            &name("_SEG", &ZERO),
            &name("_BBN", &ZERO),
            &resources(crs),
        ],
    );
    pci_control(aml);
}

/// `_OSC` of the PCI root (PCI firmware specification 3.3, section 4.5.1): the guest gets error reporting and the
/// PCI Express capability, but not native hot-plug: the slots below are ACPI's.
fn pci_control(aml: &mut Vec<u8>) {
    const PCI_ROOT_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const MASKED: u8 = 1 << 4;
    // PME, AER, PCI Express capability structure.
    const GRANTED: u8 = 0b1_1100;

    let (capabilities, local) = (Arg(3), Local(0));
    let (status, control) = (path("CDW1"), path("CDW3"));
    Method::new(
        path("_SB_.PCI0._OSC"),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &capabilities, &0u8),
            &If::new(
                &NotEqual::new(&Arg(0), &Uuid::new(PCI_ROOT_UUID)),
                vec![&Or::new(&status, &status, &UNKNOWN_UUID), &Return::new(&capabilities)],
            ),
            &If::new(&NotEqual::new(&Arg(1), &ONE), vec![&Or::new(&status, &status, &UNKNOWN_REVISION)]),
            &CreateDWordField::new(&control, &capabilities, &8u8),
            &And::new(&local, &control, &GRANTED),
            &If::new(&NotEqual::new(&local, &control), vec![&Or::new(&status, &status, &MASKED)]),
            &Store::new(&control, &local),
            &Return::new(&capabilities),
        ],
    )
    .to_aml_bytes(aml);
}

/// ACPI notification values (section 5.6.6).
mod notify {
    pub const DEVICE_CHECK: u8 = 1;
    pub const EJECT_REQUEST: u8 = 3;
    pub const POWER_BUTTON: u8 = 0x80;
    pub const GENERATION_CHANGED: u8 = 0x80;
}

/// One device per slot of bus 0 behind the host bridge, and `PCNT`, which tells the guest which ones changed.
fn pci_slots(aml: &mut Vec<u8>) {
    let mut tell_slots = Vec::new();
    for slot in layout::PCI_HOTPLUG_SLOTS {
        let slot_name = format!("S{slot:03}");
        let bit = 1u32 << slot;
        device(
            aml,
            &format!("_SB_.PCI0.{slot_name}"),
            vec![
                // Function 0: Linux looks for the very function that is named here.
                &name("_ADR", &(u32::from(slot) << 16)),
                &name("_SUN", &slot),
                &Method::new(path("_EJ0"), 1, false, vec![&Store::new(&path("PCEJ"), &bit)]),
            ],
        );
        If::new(&And::new(&ZERO, &Arg(0), &bit), vec![&Notify::new(&path(&slot_name), &Arg(1))])
            .to_aml_bytes(&mut tell_slots);
    }
    Method::new(path("_SB_.PCI0.PNTF"), 2, true, vec![&Encoded(tell_slots)]).to_aml_bytes(aml);

    let tell = |register: &str, value: u8| {
        let mut call = Vec::new();
        MethodCall::new(path("PNTF"), vec![&path(register), &value]).to_aml_bytes(&mut call);
        Encoded(call)
    };
    Method::new(
        path("_SB_.PCI0.PCNT"),
        0,
        true,
        vec![&tell("PCUP", notify::DEVICE_CHECK), &tell("PCDN", notify::EJECT_REQUEST)],
    )
    .to_aml_bytes(aml);
}

/// A virtio device over MMIO, by the ID that Linux's and FreeBSD's drivers look for. It reaches all memory coherently.
fn virtio_mmio(aml: &mut Vec<u8>, index: usize, place: &MmioPlace) {
    let registers = Memory32Fixed::new(true, place.address as u32, mmio::REGISTERS_SIZE as u32);
    let line = Interrupt::new(true, true, false, place.shared, place.gsi);
    let crs = resources(vec![&registers, &line]);
    let (id, uid, coherent) = (name("_HID", &"LNRO0005"), name("_UID", &index), name("_CCA", &ONE));
    device(aml, &format!("_SB_.V{index:03}"), vec![&id, &uid, &coherent, &crs]);
}

fn power_button(aml: &mut Vec<u8>) {
    device(aml, "_SB_.PWRB", vec![&hid("PNP0C0C"), &name("_UID", &ZERO)]);
}

/// Where the VM generation ID is ("Virtual Machine Generation ID", Microsoft): the lower and the upper half of its address.
fn generation_id(aml: &mut Vec<u8>) {
    let address = layout::GENERATION_ID;
    let (low, high) = (address as u32, (address >> 32) as u32);
    device(
        aml,
        "_SB_.VGEN",
        vec![
            &name("_HID", &"VMGENCTR"),
            &name("_CID", &"VM_Gen_Counter"),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&low, &high])),
        ],
    );
}

/// The generic event device (section 5.6.9): its interrupt runs `_EVT`.
fn event_device(aml: &mut Vec<u8>, has_pci: bool) {
    let pending = Local(0);
    let button = path("PWRB");
    let press = Notify::new(&button, &notify::POWER_BUTTON);
    let button_pressed = And::new(&ZERO, &pending, &events::POWER_BUTTON);
    let button_pressed = If::new(&button_pressed, vec![&press]);
    let generation = path("VGEN");
    let tell_generation = Notify::new(&generation, &notify::GENERATION_CHANGED);
    let generation_changed = And::new(&ZERO, &pending, &events::GENERATION);
    let generation_changed = If::new(&generation_changed, vec![&tell_generation]);
    let slots_changed = And::new(&ZERO, &pending, &events::PCI_SLOTS);
    let tell_slots = MethodCall::new(path("\\_SB_.PCI0.PCNT"), vec![]);
    let slots_changed = If::new(&slots_changed, vec![&tell_slots]);
    let registers = path("EVTS");
    let fetch = Store::new(&pending, &registers);
    let mut evt: Vec<&dyn Aml> = vec![&fetch, &button_pressed, &generation_changed];
    if has_pci {
        evt.push(&slots_changed);
    }
    device(
        aml,
        "_SB_.GED_",
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &resources(vec![&line(layout::EVENT_GSI)]),
            &Method::new(path("_EVT"), 1, true, evt),
        ],
    );
}

/// AML that is encoded already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
