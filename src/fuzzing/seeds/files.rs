//! Kernels, packages, texts.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::plant;
use crate::boot::tests::{FORMATS, bzimage, elf, pack};
use crate::fuzzing::files::{load, select};
use crate::kernels::modinfo::tests::module;
use crate::kernels::package::tests::{ar, package, tar};

fn plant_kernel(name: &str, kernel: &[u8]) {
    assert!(load(kernel).is_ok(), "{name}: {:?}", load(kernel));
    plant("kernel", name, kernel);
}

fn plant_package(name: &str, package: &[u8]) {
    assert!(select(package).is_some_and(|selection| selection.modules.len() == 4), "{name}");
    plant("package", name, package);
}

fn code() -> Vec<u8> {
    (0..600u32).map(|n| ((n * n) >> 3) as u8).collect()
}

#[test]
fn kernels_of_every_kind() {
    plant_kernel("elf", &elf(&code(), None));
    plant_kernel("elf-pvh", &elf(&code(), Some(0x100_0010)));
    for format in FORMATS {
        plant_kernel(&format!("bzimage-{format:?}"), &bzimage(&pack(format, &elf(&code(), None))));
    }
}

/// The setup of the kernels that `make guest` has fetched, in front of a small payload of each format.
#[test]
fn the_setup_of_real_kernels() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest");
    let mut found = 0;
    for name in ["cloud", "generic"] {
        let Ok(kernel) = std::fs::File::open(top.join(name).join("vmlinuz")) else { continue };
        found += 1;
        let mut start = vec![0; 0x200];
        kernel.read_exact_at(&mut start, 0).unwrap();
        let setup = (usize::from(start[0x1f1]) + 1) * 512;
        start.resize(setup, 0);
        kernel.read_exact_at(&mut start, 0).unwrap();
        for format in FORMATS {
            let payload = pack(format, &elf(&code(), Some(0x100_0010)));
            let mut image = start.clone();
            // payload_offset and payload_length.
            image[0x248..0x24c].fill(0);
            image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
            image.extend(payload);
            plant_kernel(&format!("{name}-{format:?}"), &image);
        }
    }
    if found == 0 {
        eprintln!("*** NOT TESTED: the setup of real kernels, as there is none in target/guest");
    }
}

#[test]
fn packages_of_every_compression() {
    let module = |info: &str| module(info.as_bytes());
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("./boot/vmlinuz-1", b"kernel".to_vec()),
        ("./lib/modules/1/modules.builtin", b"kernel/drivers/virtio_blk.ko\n".to_vec()),
        ("./lib/modules/1/kernel/virtio_pci.ko", module("depends=virtio_ring\0softdep=pre: crc32c post: x\0")),
        ("./lib/modules/1/kernel/virtio_ring.ko", module("depends=virtio-pci\0")),
        ("./lib/modules/1/kernel/ext4.ko", module("depends=\0alias=fs-ext4\0")),
        ("./lib/modules/1/kernel/crypto/crc32c.ko", module("alias=crc32c\0depends=\0")),
        ("./usr/share/doc/x", b"nobody's".to_vec()),
    ];
    let files: Vec<(&str, &[u8])> = files.iter().map(|(path, content)| (*path, &**content)).collect();
    let data = tar(&files);
    plant_package("gz", &package(&files));
    plant_package("none", &ar("data.tar", &data));
    let zst = ruzstd::encoding::compress_to_vec(&data[..], ruzstd::encoding::CompressionLevel::Fastest);
    plant_package("zst", &ar("data.tar.zst", &zst));
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    std::io::Write::write_all(&mut xz, &data).unwrap();
    plant_package("xz", &ar("data.tar.xz", &xz.finish().unwrap()));
}

#[test]
fn texts_of_options() {
    for (n, text) in [
        "disk.img",
        "my,,disk.img,ro=on,id=root_1,cache=unsafe,queues=16,engine=io_uring",
        "a.qcow2,format=qcow2,backing=b.qcow2,backing-format=qcow2,backing=c,backing-format=raw,ro",
        "tap=tap0,mac=02:00:00:00:00:01,mtu=9000,queues=4,vhost=on",
        "file=/a=b,c",
        "socket=/run/x",
        "mmio,pci=off",
        "512M",
    ]
    .into_iter()
    .enumerate()
    {
        plant("options", &n.to_string(), text.as_bytes());
    }
}
