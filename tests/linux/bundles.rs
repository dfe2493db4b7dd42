//! Imported kernels: Debian's packages, as they come, boot by name and find their root.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::guest::{Guest, assets, value};
use crate::support::{Running, tranche};

/// Unpacking a package takes minutes where the host is emulated, too.
const IMPORT_LIMIT: Duration = Duration::from_secs(600);

/// Where these tests keep imported kernels: for as long as `target` stays, and each run imports anew.
const DATA: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/bundles");

/// A guest with an imported kernel, which is imported by the first test that asks for it. It has no disk yet.
fn imported(kernel: &str) -> Guest {
    static DONE: [OnceLock<()>; 2] = [OnceLock::new(), OnceLock::new()];
    let mut guest = Guest::on_kernel(kernel);
    guest.command.env("XDG_DATA_HOME", DATA);
    DONE[usize::from(kernel == "cloud")].get_or_init(|| {
        let package = assets().join(kernel).join("package.deb");
        let mut import = tranche();
        import.args(["kernel", "import", "--force"]).arg(package).arg(kernel).env("XDG_DATA_HOME", DATA);
        let ended = Running::start(&mut import).wait(IMPORT_LIMIT).expect_code(0);
        assert!(ended.output.contains("root on ext4, xfs, btrfs, squashfs, erofs\n"), "{}", ended.output);
        assert_eq!(ended.errors, "", "Debian's kernels lack nothing");
    });
    guest
}

fn root_on(file_system: &str) -> PathBuf {
    match file_system {
        "ext4" => assets().join("rootfs.ext4"),
        other => assets().join("roots").join(other),
    }
}

fn read_only(disk: &Path) -> String {
    format!("{},ro", disk.display())
}

const LOOK_AROUND: &str = "
echo release=$(uname -r)
echo root=$(awk '$2 == \"/\" { print $1, $3 }' /proc/mounts | tail -n 1)
echo init=$(ps -o pid,comm | awk '$1 == 1 { print $2 }')
echo modules=$(ls /modules 2> /dev/null | wc -l)
echo entropy=$(cat /sys/class/misc/hw_random/rng_current)
echo vsock=$(ls /sys/bus/virtio/drivers | grep -c vsock)
";

/// Boots, and finds the root in place and nothing of the initrd.
#[track_caller]
fn boots(guest: Guest, kernel: &str, root: &str) {
    let ended = guest.run(LOOK_AROUND).expect_code(0);
    let release = value(&ended.output, "release");
    assert_eq!(release.contains("cloud"), kernel == "cloud", "{release}");
    assert_eq!(value(&ended.output, "root"), root);
    assert_eq!(value(&ended.output, "init"), "init");
    assert_eq!(value(&ended.output, "modules"), "0");
    assert!(value(&ended.output, "entropy").starts_with("virtio_rng"), "{}", ended.output);
    assert_eq!(value(&ended.output, "vsock"), "1");
}

#[test]
fn the_cloud_kernel_finds_its_root_by_its_label_and_hears_the_power_button() {
    let mut guest = imported("cloud");
    let other = guest.dir.path().join("other");
    std::fs::write(&other, [0; 4096]).unwrap();
    guest.command.arg("--disk").arg(read_only(&other)).arg("--disk").arg(read_only(&root_on("ext4")));
    let guest = guest.cmdline("root=LABEL=tranche");
    let ended = guest.run_to_the_power_button("echo root=$(grep ' / ' /proc/mounts | tail -n 1)");
    assert!(value(&ended.output, "root").starts_with("/dev/vdb / ext4 ro,"), "{}", ended.output);
}

#[test]
fn the_generic_kernel_finds_its_root_by_its_uuid_over_mmio() {
    let guest = imported("generic").arg("--transport", "mmio").arg("--disk", read_only(&root_on("ext4")));
    boots(guest.cmdline("root=UUID=7472616E-6368-6500-0000-000000000001"), "generic", "/dev/vda ext4");
}

#[test]
fn a_root_on_squashfs_in_a_partition() {
    const START: usize = 2048;
    let guest = imported("cloud");
    let content = std::fs::read(root_on("squashfs")).unwrap();
    let mut disk = vec![0; START * 512];
    disk[440..444].copy_from_slice(&0x7261_6e63u32.to_le_bytes());
    // One entry: of Linux, from sector to sector (those of cylinders and heads are read by nobody).
    disk[446 + 4] = 0x83;
    disk[446 + 8..446 + 12].copy_from_slice(&(START as u32).to_le_bytes());
    disk[446 + 12..446 + 16].copy_from_slice(&(content.len() as u32 / 512).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend_from_slice(&content);
    let path = guest.dir.path().join("partitioned");
    std::fs::write(&path, disk).unwrap();
    boots(guest.arg("--disk", path).cmdline("root=PARTUUID=72616e63-01"), "cloud", "/dev/vda1 squashfs");
}

/// Every file system, with the kernel's command line as `--rootfs` makes it.
fn every_file_system(kernel: &str, transport: &str) {
    for file_system in ["ext4", "xfs", "btrfs", "squashfs", "erofs"] {
        let guest = imported(kernel).arg("--transport", transport).arg("--rootfs", read_only(&root_on(file_system)));
        boots(guest, kernel, &format!("/dev/vda {file_system}"));
    }
}

#[test]
#[ignore = "long: make soak"]
fn every_file_system_with_the_cloud_kernel_over_pci() {
    every_file_system("cloud", "pci");
}

#[test]
#[ignore = "long: make soak"]
fn every_file_system_with_the_cloud_kernel_over_mmio() {
    every_file_system("cloud", "mmio");
}

#[test]
#[ignore = "long: make soak"]
fn every_file_system_with_the_generic_kernel_over_pci() {
    every_file_system("generic", "pci");
}

#[test]
#[ignore = "long: make soak"]
fn every_file_system_with_the_generic_kernel_over_mmio() {
    every_file_system("generic", "mmio");
}

#[test]
fn a_root_that_is_not_there_is_a_panic_and_the_console_says_which() {
    let guest = imported("cloud").arg("--disk", read_only(&root_on("ext4")));
    let ended = guest.cmdline("root=LABEL=elsewhere").run("true").expect_code(4);
    let said = "tranche init: root=LABEL=elsewhere has not appeared; block devices: vda, vdb\n";
    assert!(ended.output.contains(said), "{}", ended.output);
    assert!(ended.errors.contains("panicked"), "{}", ended.errors);
}
