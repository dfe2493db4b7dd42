use super::*;
use crate::memory::anonymous;
use proptest::prelude::*;
use vm_memory::GuestMemoryBackend;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest physical address, its header checked.
fn table_at(area: &[u8], address: u64) -> &[u8] {
    let rest = &area[(address - layout::ACPI) as usize..];
    let table = &rest[..u32_at(rest, 4) as usize];
    assert_eq!(sum(table), 0, "checksum of {:?}", std::str::from_utf8(&table[..4]));
    assert_eq!(address % 16, 0);
    table
}

/// Walks the tables as a guest does.
struct Found<'a> {
    fadt: &'a [u8],
    madt: &'a [u8],
    mcfg: Option<&'a [u8]>,
    dsdt: &'a [u8],
}

fn walk(area: &[u8]) -> Found<'_> {
    assert_eq!(&area[..8], b"RSD PTR ");
    assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
    assert_eq!((area[15], u32_at(area, 20)), (2, 36));
    let xsdt = table_at(area, u64_at(area, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let find = |signature: &[u8; 4]| {
        let mut tables = xsdt[36..].chunks(8).map(|entry| table_at(area, u64_at(entry, 0)));
        tables.find(|table| &table[..4] == signature)
    };
    let fadt = find(b"FACP").unwrap();
    let dsdt = table_at(area, u64_at(fadt, 140));
    assert_eq!((&dsdt[..4], dsdt[8]), (&b"DSDT"[..], 2));
    Found { fadt, madt: find(b"APIC").unwrap(), mcfg: find(b"MCFG"), dsdt }
}

fn with_window(cpus: u16, window_64: Option<(u64, u64)>) -> AcpiConfig {
    AcpiConfig { cpus, pci: Some(PciTables { window_64 }), virtio_mmio: Vec::new() }
}

fn config(cpus: u16) -> AcpiConfig {
    with_window(cpus, Some((0x40_0000_0000, 0x80_0000_0000)))
}

#[test]
fn the_fadt_describes_a_hardware_reduced_platform() {
    let area = build(&config(1)).unwrap();
    let fadt = walk(&area).fadt;
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 4));
    let flags = u32_at(fadt, 112);
    assert_eq!(flags >> 20 & 1, 1, "hardware reduced");
    assert_eq!(flags >> 10 & 1, 1, "reset register");
    // No VGA, no ASPM, no CMOS clock; no 8042.
    assert_eq!(fadt[109..111], [0x34, 0]);
    for (at, port) in [(116, layout::RESET_PORT), (244, layout::SLEEP_CONTROL_PORT), (256, layout::SLEEP_STATUS_PORT)] {
        assert_eq!(fadt[at..at + 4], [1, 8, 0, 1], "a byte-wide port");
        assert_eq!(u64_at(fadt, at + 4), u64::from(port));
    }
    assert_eq!(fadt[128], layout::RESET_VALUE);
}

/// APIC IDs the MADT declares, and the I/O APICs' addresses.
fn interrupt_controllers(madt: &[u8]) -> (Vec<u32>, Vec<u32>) {
    assert_eq!(u32_at(madt, 36), 0xfee0_0000);
    let (mut cpus, mut ioapics) = (vec![], vec![]);
    let mut rest = &madt[44..];
    while let [kind, length, ..] = *rest {
        let entry;
        (entry, rest) = rest.split_at(length.into());
        match (kind, length) {
            (0, 8) => {
                assert_eq!((entry[2], u32_at(entry, 4)), (entry[3], 1));
                assert_ne!(entry[3], 255, "the broadcast ID");
                cpus.push(entry[3].into());
            }
            (9, 16) => {
                assert_eq!((u32_at(entry, 12), u32_at(entry, 8)), (u32_at(entry, 4), 1));
                cpus.push(u32_at(entry, 4));
            }
            (1, 12) => {
                assert_eq!(u32_at(entry, 8), 0, "first GSI");
                ioapics.push(u32_at(entry, 4));
            }
            other => panic!("unexpected entry {other:?}"),
        }
    }
    (cpus, ioapics)
}

#[test]
fn every_cpu_is_declared_once_and_all_fits() {
    for cpus in (1..=64).chain([254, 255, 256, 1024]) {
        let area = build(&config(cpus)).unwrap();
        assert!(area.len() <= ROOM, "{cpus} CPUs take {} bytes", area.len());
        let (ids, ioapics) = interrupt_controllers(walk(&area).madt);
        assert_eq!(ids, (0..u32::from(cpus)).collect::<Vec<_>>());
        assert_eq!(ioapics, [0xfec0_0000]);
    }
    assert!(matches!(build(&config(u16::MAX)), Err(AcpiError::TooLarge { .. })));
}

#[test]
fn configuration_space_is_bus_0_alone() {
    let area = build(&config(1)).unwrap();
    let mcfg = walk(&area).mcfg.unwrap();
    assert_eq!((mcfg.len(), u64_at(mcfg, 44)), (60, layout::ECAM));
    assert_eq!(mcfg[52..56], [0, 0, 0, 0], "segment, first and last bus");
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_dsdt_names_every_device() {
    let area = build(&config(1)).unwrap();
    let dsdt = walk(&area).dsdt;
    for slot in 1..=31 {
        assert!(contains(dsdt, format!("S{slot:03}").as_bytes()), "slot {slot}");
    }
    for name in ["_S5_", "PCI0", "COM1", "PWRB", "_EVT", "_OSC", "ACPI0013", "QEMU0001"] {
        assert!(contains(dsdt, name.as_bytes()), "{name}");
    }
    assert!(contains(dsdt, &layout::EVENT_DEVICE.to_le_bytes()[..4]));
    // A package of two double words: where the generation ID is.
    let mut address = vec![0x12, 7, 2, 0x0c];
    address.extend((layout::GENERATION_ID as u32).to_le_bytes());
    assert!(contains(dsdt, b"VMGENCTR") && contains(dsdt, &address[4..]), "{dsdt:x?}");
}

#[test]
fn devices_over_mmio_are_named_with_pci_and_without() {
    let virtio_mmio = layout::virtio_mmio(31);
    for pci in [None, Some(PciTables { window_64: None })] {
        let has_pci = pci.is_some();
        let area = build(&AcpiConfig { cpus: 64, pci, virtio_mmio: virtio_mmio.clone() }).unwrap();
        let found = walk(&area);
        for (index, place) in virtio_mmio.iter().enumerate() {
            // Extended interrupt descriptor: consumer, edge, active high, perhaps shared; one line.
            let flags = 0b0011 | u8::from(place.shared) << 3;
            let mut crs = vec![0x86, 9, 0, 1];
            crs.extend((place.address as u32).to_le_bytes());
            crs.extend([0, 0x10, 0, 0, 0x89, 6, 0, flags, 1]);
            crs.extend(place.gsi.to_le_bytes());
            assert!(contains(found.dsdt, &crs), "device {index}");
            assert!(contains(found.dsdt, format!("V{index:03}").as_bytes()), "device {index}");
        }
        assert_eq!(found.mcfg.is_some(), has_pci);
        for name in ["PCI0", "S001", "PCNT"] {
            assert_eq!(contains(found.dsdt, name.as_bytes()), has_pci, "{name}");
        }
        for name in ["_S5_", "COM1", "PWRB", "_EVT", "LNRO0005", "QEMU0001"] {
            assert!(contains(found.dsdt, name.as_bytes()), "{name}");
        }
    }
}

#[test]
fn the_64_bit_window_is_there_when_asked_for() {
    let window = |window_64| build(&with_window(1, window_64));
    let (start, end) = (0x12_3400_0000u64, 0x56_7800_0000u64);
    let descriptor = [0u64, start, end - 1, 0, end - start].map(u64::to_le_bytes).concat();
    assert!(contains(walk(&window(Some((start, end))).unwrap()).dsdt, &descriptor));
    assert!(!contains(walk(&window(None).unwrap()).dsdt, &[0x8a, 43, 0]), "no quad-word descriptor");
    assert!(matches!(window(Some((end, end))), Err(AcpiError::EmptyWindow { .. })));
}

#[test]
fn memory_that_ends_too_early_is_an_error() {
    let ram = anonymous(&[(GuestAddress(0), layout::ACPI)]).unwrap();
    assert!(matches!(write(&ram, &config(1)), Err(AcpiError::Ram(_))));
}

proptest! {
    #[test]
    fn nothing_is_written_outside_the_area(cpus in 1u16..=255, start in 1u64 << 32..1 << 45, size in 1u64..1 << 40) {
        let ram = anonymous(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        let mut before = vec![0x5a; 0x20_0000];
        ram.write_slice(&before, GuestAddress(0)).unwrap();
        let rsdp = write(&ram, &with_window(cpus, Some((start, start + size)))).unwrap();
        prop_assert_eq!(rsdp, layout::ACPI);
        let mut after = vec![0; 0x20_0000];
        ram.read_slice(&mut after, GuestAddress(0)).unwrap();
        let area = layout::ACPI as usize..layout::ACPI_END as usize;
        walk(&after[area.clone()]);
        before[area.clone()].copy_from_slice(&after[area]);
        prop_assert!(before == after);
        prop_assert_eq!(ram.num_regions(), 1);
    }
}
