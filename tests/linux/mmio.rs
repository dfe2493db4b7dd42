//! Devices over MMIO, which the guest finds through ACPI.

use std::fs::File;

use crate::guest::{Guest, LIMIT, value};

const LOOK_AROUND: &str = "
echo devices=$(ls /sys/bus/platform/drivers/virtio-mmio | grep -c LNRO0005)
echo pci=$(ls /sys/bus/pci/devices 2> /dev/null | wc -l)
echo entropy=$(cat /sys/class/misc/hw_random/rng_current)
echo lines=$(grep -c virtio /proc/interrupts)
dd if=$(disk from) of=$(disk to) bs=1M conv=fsync 2> /dev/null
";

/// Root disk, script, two more and the entropy device: all of them work, whatever else is there.
fn everything_works(kernel: &str, transport: &str, cpus: &str, pci_devices: &str) {
    let mut guest = Guest::new(kernel).arg("--transport", transport).arg("--cpus", cpus);
    let (from, to) = (guest.dir.path().join("from"), guest.dir.path().join("to"));
    let pattern: Vec<u8> = (1u32..).flat_map(u32::to_le_bytes).take(4 << 20).collect();
    std::fs::write(&from, &pattern).unwrap();
    File::create_new(&to).unwrap().set_len(4 << 20).unwrap();
    guest.command.arg("--disk").arg(format!("{},ro,id=from", from.display()));
    guest.command.arg("--disk").arg(format!("{},id=to", to.display()));
    let ended = guest.start(LOOK_AROUND).wait(LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "devices"), "5");
    assert_eq!(value(&ended.output, "lines"), "5");
    assert_eq!(value(&ended.output, "pci"), pci_devices);
    assert!(value(&ended.output, "entropy").starts_with("virtio_rng"), "{}", ended.output);
    assert!(std::fs::read(&to).unwrap() == pattern, "the copy differs");
}

#[test]
fn the_cloud_kernel_without_pci() {
    everything_works("cloud", "mmio", "4", "0");
}

#[test]
fn the_cloud_kernel_beside_an_empty_pci_root() {
    everything_works("cloud", "mmio,pci", "1", "1");
}

#[test]
fn the_generic_kernel_without_pci() {
    everything_works("generic", "mmio", "2", "0");
}

/// More devices than lines: some share theirs.
#[test]
fn thirty_one_devices() {
    let mut guest = Guest::new("cloud").arg("--transport", "mmio");
    for i in 0..28 {
        let path = guest.dir.path().join(format!("disk{i}"));
        std::fs::write(&path, [b"0123456789abcdefghijklmnopqrstuvwxyz"[i]; 4096]).unwrap();
        guest.command.arg("--disk").arg(format!("{},ro,id=disk{i}", path.display()));
    }
    let read_all = "echo all=$(for i in $(seq 0 27); do dd if=$(disk disk$i) bs=1 count=1 2> /dev/null; done)";
    let ended = guest.start(read_all).wait(LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "all"), "0123456789abcdefghijklmnopqr");
}
