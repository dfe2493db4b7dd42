//! Kernels reach userspace, and find the machine they were promised.

use std::path::Path;

use crate::guest::{Guest, assets, value};
use crate::support::tranche;

const LOOK_AROUND: &str = "
echo release=$(uname -r)
echo cpus=$(nproc)
echo memory=$(sed -n 's/^MemTotal: *//p' /proc/meminfo)
echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
echo entropy=$(cat /sys/class/misc/hw_random/rng_current)
echo pv=$(dmesg | grep -c 'Hypervisor detected: KVM')
echo year=$(date +%Y)
";

fn boots(kernel: &str, cpus: &str) {
    let ended = Guest::new(kernel).arg("--cpus", cpus).run(LOOK_AROUND).expect_code(0);
    let release = value(&ended.output, "release");
    assert_eq!(release.contains("cloud"), kernel == "cloud", "{release}");
    assert_eq!(value(&ended.output, "cpus"), cpus);
    assert_eq!(value(&ended.output, "clock"), "kvm-clock");
    assert!(value(&ended.output, "entropy").starts_with("virtio_rng"), "{}", ended.output);
    assert_eq!(value(&ended.output, "pv"), "1");
    assert!(value(&ended.output, "year").parse::<u32>().unwrap() >= 2024, "the guest knows the time");
}

#[test]
fn the_cloud_kernel_with_1_cpu() {
    boots("cloud", "1");
}

#[test]
fn the_cloud_kernel_with_4_cpus() {
    boots("cloud", "4");
}

#[test]
fn the_generic_kernel_with_1_cpu() {
    boots("generic", "1");
}

#[test]
fn the_generic_kernel_with_4_cpus() {
    boots("generic", "4");
}

#[test]
fn memory_beyond_the_gap_below_4_gib() {
    let ended = Guest::new("cloud").arg("--memory", "5G").run(LOOK_AROUND).expect_code(0);
    let kib: u64 = value(&ended.output, "memory").trim_end_matches(" kB").parse().unwrap();
    assert!((4_700_000..5_300_000).contains(&kib), "{kib} KiB of 5 GiB");
}

#[test]
fn an_elf_kernel_and_a_bzimage_that_unpacks_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (bzimage, initrd) = (assets().join("cloud/vmlinuz"), assets().join("cloud/initrd"));
    let boot = |kernel: &Path| {
        let mut guest = Guest::with(kernel, &initrd);
        guest.command.env("XDG_CACHE_HOME", dir.path());
        let ended = guest.run(LOOK_AROUND).expect_code(0);
        assert!(value(&ended.output, "release").contains("cloud"), "{}", ended.output);
    };
    // The first start leaves the unpacked kernel in the cache, an ELF as good as any.
    boot(&bzimage);
    let kernels = std::fs::read_dir(dir.path().join("tranche/kernels")).unwrap().map(|entry| entry.unwrap());
    let elf = kernels.filter(|entry| entry.file_type().unwrap().is_file()).map(|entry| entry.path()).next().unwrap();
    boot(&elf);
    // A payload that is none, by the header: the kernel's own entry code knows better where it is.
    let own = dir.path().join("bzImage");
    let mut bytes = std::fs::read(&bzimage).unwrap();
    bytes[0x24c..0x250].copy_from_slice(&16u32.to_le_bytes());
    std::fs::write(&own, bytes).unwrap();
    boot(&own);
}

#[test]
fn the_timeline_tells_when_userspace_was_reached() {
    let mut guest = Guest::new("cloud");
    guest.command.arg("--boot-timeline");
    let ended = guest.run("true").expect_code(0);
    let last = ended.errors.lines().find(|l| l.contains("userspace")).unwrap_or_else(|| panic!("{}", ended.errors));
    let ms: f64 = last.split_whitespace().next().unwrap().parse().expect("userspace was reached");
    assert!(ms > 1.0);
}

#[test]
fn too_little_memory_for_a_kernel_is_refused_with_the_least_it_takes() {
    let kernel = assets().join("generic/vmlinuz");
    let mut command = tranche();
    command.arg("run").arg("--kernel").arg(&kernel).args(["--memory", "32M"]);
    let ended = crate::support::Running::start(&mut command).wait(crate::guest::LIMIT).expect_code(23);
    let text = &ended.errors;
    let least: u64 = text.split("at least ").nth(1).and_then(|t| t.split(' ').next()).unwrap().parse().unwrap();
    assert!((33..=256).contains(&least), "{text}");
}
