//! Images and file systems as their makers write them.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use tempfile::tempdir;
use vm_memory::GuestAddress;

use super::{plant, sparse, sparse_bytes};
use crate::backend::disk::qcow2::Qcow2;
use crate::backend::disk::tests::patiently;
use crate::backend::disk::tools::create;
use crate::backend::{Disk, OpenDirectly};
use crate::config::{Backing, DiskFormat, Image};
use crate::fuzzing::disks::image::{BACKED, READ_ONLY, REPAIR};
use crate::fuzzing::disks::open_and_exercise;
use crate::guest_init::partitions::tests::disk_with_gpt;
use crate::guest_init::superblock::{PROBED, probe};
use crate::memory::{IoBuf, anonymous};
use crate::resize;

const SIZE: u64 = 1 << 20;

fn open(path: &Path, backing: &[Backing]) -> Disk {
    let image = Image { format: Some(DiskFormat::Qcow2), backing: backing.to_vec() };
    patiently(|| Disk::open_image(&OpenDirectly, path, false, &image))
}

fn write(disk: &Disk) {
    let ram = anonymous(&[(GuestAddress(0), 0x1000)]).unwrap();
    let mut buffer = IoBuf::new(ram);
    buffer.push(0, 0x1000).unwrap();
    buffer.copy_from(b"written");
    disk.write(&mut buffer, 0x1_8000, None).unwrap();
    disk.flush().unwrap();
}

fn plant_image(name: &str, bits: u8, path: &Path) {
    let image = sparse(&File::open(path).unwrap());
    let seed = [&[bits], &image[..]].concat();
    assert!(open_and_exercise(&seed).is_some(), "{name} does not open");
    plant("qcow2", name, &seed);
}

#[test]
fn images_of_our_own() {
    let dir = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let empty = at("empty");
    create(&empty, Some(SIZE), DiskFormat::Qcow2, None, false).unwrap();
    plant_image("empty", 0, &empty);
    plant_image("read-only", READ_ONLY, &empty);

    let raw = Backing { path: at("raw"), format: Some(DiskFormat::Raw) };
    File::create(&raw.path).unwrap().set_len(SIZE).unwrap();
    let overlay = at("overlay");
    create(&overlay, Some(SIZE), DiskFormat::Qcow2, Some(&raw), false).unwrap();
    write(&open(&overlay, std::slice::from_ref(&raw)));
    plant_image("overlay", BACKED, &overlay);

    // As it is when power is lost: a copy while it is in use.
    let disk = open(&empty, &[]);
    write(&disk);
    std::fs::copy(&empty, at("dirty")).unwrap();
    drop(disk);
    assert!(!Qcow2::repair(&OpenDirectly, &at("dirty")).unwrap(), "it was not closed");
    let disk = open(&empty, &[]);
    write(&disk);
    std::fs::copy(&empty, at("dirty")).unwrap();
    plant_image("dirty", REPAIR, &at("dirty"));
}

#[test]
fn images_of_qemu() {
    let dir = tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [&[7; 0x600][..], &[0; 0xfa00]].concat()).unwrap();
    let compressed = ["-c", "-o", "cluster_size=512"];
    for (name, options) in [
        ("small-clusters", &["-o", "cluster_size=512"][..]),
        ("large-clusters", &["-o", "cluster_size=2M"]),
        ("compressed", &compressed),
        ("old", &["-o", "compat=0.10"]),
        ("narrow-counts", &["-o", "refcount_bits=1"]),
        ("wide-counts", &["-o", "refcount_bits=64,cluster_size=4096"]),
        ("lazy-counts", &["-o", "lazy_refcounts=on"]),
    ] {
        let image = dir.path().join(name);
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-O", "qcow2"]).args(options).arg(&raw).arg(&image);
        let Ok(made) = command.output() else {
            return eprintln!("*** NOT TESTED: seeds of QEMU's, as there is no qemu-img");
        };
        assert!(made.status.success(), "{name}: {}", String::from_utf8_lossy(&made.stderr));
        // The format's second version is only read.
        plant_image(name, if name == "old" { READ_ONLY } else { 0 }, &image);
    }
}

fn plant_root(name: &str, line: &str, start: &[u8]) {
    let seed = [&(line.len() as u16).to_le_bytes(), line.as_bytes(), &sparse_bytes(start)].concat();
    plant("root", name, &seed);
}

#[test]
fn disks_that_roots_are_on() {
    const LINES: [&str; 4] = [
        "console=ttyS0 root=/dev/vda rw rootwait init=/sbin/init",
        "root=UUID=0123ABCD-89ef-4a5b-8c6d-7e8f90a1b2c3 rootflags=\"data=ordered\" rootdelay=3 ro",
        "quiet root=LABEL=\"a label\" rootfstype=xfs -- root=not-ours",
        "root=PARTUUID=0123abcd-01 root=PARTLABEL=linux root=/dev/disk/by-partuuid/x",
    ];
    let dir = tempdir().unwrap();
    let from = dir.path().join("from");
    std::fs::create_dir(&from).unwrap();
    let image = dir.path().join("image");
    let path = format!("{}:/sbin:/usr/sbin", std::env::var("PATH").unwrap());
    let (at, from) = (image.to_str().unwrap(), from.to_str().unwrap());
    let makers = [
        ("ext4", format!("mke2fs -q -t ext4 -L 'a label' {at}")),
        ("xfs", format!("mkfs.xfs -q -L a-label {at}")),
        ("btrfs", format!("mkfs.btrfs -q -L 'a label' {at}")),
        ("squashfs", format!("mksquashfs {from} {at} -noappend -quiet")),
        ("erofs", format!("mkfs.erofs {at} {from}")),
    ];
    for ((name, maker), line) in makers.iter().zip(LINES.iter().cycle()) {
        File::create(&image).unwrap().set_len(512 << 20).unwrap();
        let made = Command::new("sh").args(["-c", maker]).env("PATH", &path).output().unwrap();
        if made.status.code() == Some(127) {
            assert_ne!(*name, "ext4", "e2fsprogs is not installed");
            eprintln!("*** NOT TESTED: a seed of {name}, whose maker is not installed");
            continue;
        }
        assert!(made.status.success(), "{name}: {}", String::from_utf8_lossy(&made.stderr));
        let mut start = vec![0; PROBED.min(std::fs::metadata(&image).unwrap().len() as usize)];
        std::os::unix::fs::FileExt::read_exact_at(&File::open(&image).unwrap(), &mut start, 0).unwrap();
        assert!(probe(&start).is_some(), "{name}");
        plant_root(name, line, &start);
    }
    for sector in [512, 4096] {
        plant_root(&format!("gpt-{sector}"), LINES[3], &disk_with_gpt(sector));
    }
}

#[test]
fn disks_that_get_another_size() {
    plant("layout", "gpt", &resize::tests::disk(2));
    let ext = [&[0; 1024][..], &resize::tests::superblock(9), &[0; 4096]].concat();
    plant("layout", "ext", &ext);
    plant("layout", "xfs", &[b"XFSB".as_slice(), &[0; 600]].concat());
}
