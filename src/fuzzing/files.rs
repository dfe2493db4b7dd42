//! Kernels, kernel packages, and the text of options.

use std::fs;
use std::io::Seek;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::GuestAddress;

use super::memory_files::file;
use crate::backend::KernelCache;
use crate::boot::{self, BootError, BootFile, BootSource};
use crate::config::{Backing, DiskConfig, MacAddress, MemorySize, NetConfig, SerialConfig, Transport};
use crate::kernels::modules::{Index, Selection};
use crate::kernels::{package as deb, tree};
use crate::memory::anonymous;
use crate::platform::layout;

/// Bytes of memory that kernels are loaded into: enough for one, and touched only where it is.
const MEMORY: u64 = 128 << 20;

/// Loads a kernel with an initrd: the input is its file.
pub fn kernel(input: &[u8]) {
    if let Err(error) = load(input) {
        assert!(!error.to_string().is_empty());
    }
}

pub fn load(input: &[u8]) -> Result<(), BootError> {
    let ram = anonymous(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
    let boot_file = |content: &[u8]| BootFile { file: file(content), path: "file".into() };
    let source = BootSource {
        kernel: boot_file(input),
        initrd: Some(boot_file(&[0x55; 5000])),
        cmdline: "console=ttyS0 root=/dev/vda".into(),
        rsdp: layout::ACPI,
    };
    boot::load(&ram, &source, &KernelCache::off()).map(drop)
}

/// Imports a kernel package as far as its modules are chosen: the input is the package.
pub fn package(input: &[u8]) {
    let _ = select(input);
}

/// Its modules, if all is well with it.
pub fn select(input: &[u8]) -> Option<Selection> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("tranche-fuzzing-{}-{number}", std::process::id()));
    fs::create_dir(&dir).expect("a directory for temporary files");
    let mut package = file(input);
    package.rewind().expect("a file in memory");
    let selection = deb::unpack(&mut package, &dir).ok().and_then(|()| {
        let found = tree::find(&dir, None).ok()?;
        Index::read(&found.modules).ok()?.select().ok()
    });
    fs::remove_dir_all(&dir).expect("what was unpacked is ours");
    selection
}

/// Parses the texts of options: the input is one.
pub fn options(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Err(error) = text.parse::<DiskConfig>() {
        assert!(!error.to_string().is_empty());
    }
    if let Err(error) = text.parse::<NetConfig>() {
        assert!(!error.to_string().is_empty());
    }
    let _ = (text.parse::<SerialConfig>(), text.parse::<Transport>(), text.parse::<Backing>());
    let _ = (text.parse::<MemorySize>(), text.parse::<MacAddress>());
}
