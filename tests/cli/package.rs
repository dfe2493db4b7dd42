//! Debian packages with kernels in them, made byte by byte: a hostile one is nothing that a tool would write.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::support::guests;

pub const REGULAR: u8 = b'0';
/// The content is the name of the entry that follows.
pub const LONG_NAME: u8 = b'L';

/// What a kernel has to have built in, so that no module is needed.
pub const ALL_BUILT_IN: &str = "kernel/virtio_pci.ko\nkernel/virtio_mmio.ko\nkernel/virtio_blk.ko\nkernel/ext4.ko\n";

/// A package that is being filled.
pub struct Package {
    tar: GzEncoder<Vec<u8>>,
}

impl Package {
    /// An empty one.
    pub fn new() -> Self {
        Self { tar: GzEncoder::new(Vec::new(), Compression::fast()) }
    }

    /// A kernel that boots anywhere, of release `test`, which has all it needs built in.
    pub fn of_kernel() -> Self {
        Self::of_kernel_with(ALL_BUILT_IN)
    }

    pub fn of_kernel_with(builtin: &str) -> Self {
        let kernel = std::fs::read(guests().join("hello")).unwrap();
        Self::new().file("boot/vmlinuz-test", &kernel).file("lib/modules/test/modules.builtin", builtin.as_bytes())
    }

    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(REGULAR, path, content.len() as u64, content)
    }

    /// A module of release `test`.
    pub fn module(self, name: &str, info: &str) -> Self {
        self.module_of(name, &module(info))
    }

    pub fn module_of(self, name: &str, content: &[u8]) -> Self {
        self.file(&format!("lib/modules/test/kernel/{name}.ko"), content)
    }

    /// A file whose path does not fit into a header.
    pub fn file_far_down(self, path: &str, content: &[u8]) -> Self {
        self.entry(LONG_NAME, "././@LongLink", path.len() as u64, path.as_bytes()).file("short", content)
    }

    /// An entry as it comes: `size` bytes of `content`.
    pub fn entry(mut self, kind: u8, path: &str, size: u64, content: impl Read) -> Self {
        let mut header = [0; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar  \0");
        // The sum of all bytes, with spaces for the sum itself.
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().copied().map(u32::from).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.tar.write_all(&header).unwrap();
        io::copy(&mut content.take(size), &mut self.tar).unwrap();
        let padding = size.next_multiple_of(512) - size;
        self.tar.write_all(&[0; 512][..padding as usize]).unwrap();
        self
    }

    pub fn bytes(mut self) -> Vec<u8> {
        self.tar.write_all(&[0; 1024]).unwrap();
        deb("data.tar.gz", &self.tar.finish().unwrap())
    }

    pub fn save(self, dir: &Path) -> PathBuf {
        save(dir, &self.bytes())
    }
}

pub fn save(dir: &Path, package: &[u8]) -> PathBuf {
    let path = dir.join("package.deb");
    std::fs::write(&path, package).unwrap();
    path
}

/// The outer archive: deb(5), ar(5).
pub fn deb(name: &str, data: &[u8]) -> Vec<u8> {
    let mut package = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", &b"2.0\n"[..]), ("control.tar", b"odd"), (name, data)] {
        writeln!(package, "{name:<16}{:<32}{:<10}`", "", content.len()).unwrap();
        package.extend_from_slice(content);
        package.resize(package.len().next_multiple_of(2), b'\n');
    }
    package
}

/// An ELF file with a section `.modinfo` alone.
pub fn module(info: &str) -> Vec<u8> {
    const NAMES: &[u8] = b"\0.modinfo\0";
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf.extend_from_slice(NAMES);
    let info_at = elf.len() as u64;
    elf.extend_from_slice(info.as_bytes());
    let table = elf.len() as u64;
    for (name, at, len) in [(0u32, 64, NAMES.len() as u64), (1, info_at, info.len() as u64)] {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&at.to_le_bytes());
        header[0x20..0x28].copy_from_slice(&len.to_le_bytes());
        elf.extend_from_slice(&header);
    }
    elf[0x28..0x30].copy_from_slice(&table.to_le_bytes());
    elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
    elf[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
    elf
}
