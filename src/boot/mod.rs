//! From a kernel file to the first instruction.
//!
//! A kernel is an ELF, or a bzImage that is unpacked to one here, on the host: that is faster than in the guest, and
//! is done once. It is entered by PVH if it says so, else by Linux's 64-bit boot protocol.

mod bzimage;
mod cmdline;
mod elf;
mod error;
mod image;
mod initrd;
mod kernel;
mod long_mode;
mod memory_map;
mod params;
mod payload;
mod room;
mod sparse;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::{File, Metadata};
use std::io;
use std::path::PathBuf;

pub use error::{BootError, Flaw, Minimum};
pub use payload::{Format, UnpackError};
pub use sparse::copy_sparse;

use crate::backend::KernelCache;
use crate::cpu::EntryPoint;
use crate::memory::{RamRegions, total_bytes};
use crate::platform::layout;
use bzimage::SetupHeader;
use image::Entry;
use kernel::Kernel;
use params::Params;
use room::LowRam;

/// A file to boot from. The path is for messages only.
#[derive(Debug)]
pub struct BootFile {
    pub file: File,
    pub path: PathBuf,
}

/// What to boot.
#[derive(Debug)]
pub struct BootSource {
    pub kernel: BootFile,
    pub initrd: Option<BootFile>,
    pub cmdline: String,
    /// Guest physical address of the ACPI root pointer.
    pub rsdp: u64,
}

/// Highest address of an initrd for a kernel that does not tell: `initrd_addr_max` before boot protocol 2.03.
const INITRD_LAST: u64 = 0x37ff_ffff;

/// Puts kernel, initrd, command line and what the boot protocol asks for into guest memory.
///
/// The memory has to be fresh, as `memory::anonymous` makes it: zeroes (the kernel's bss, for one) are not written.
/// Everything that can be checked is checked before anything is written.
///
/// # Errors
/// Each mistake a user can make has its own variant of [`BootError`].
pub fn load(ram: &RamRegions, source: &BootSource, cache: &KernelCache) -> Result<EntryPoint, BootError> {
    let path = &source.kernel.path;
    let low = LowRam::of(ram);
    let memory_mib = total_bytes(ram) >> 20;

    let initrd_size = source.initrd.as_ref().map(initrd::size).transpose()?;
    let kernel = Kernel::identify(&source.kernel).map_err(|error| error.of(path))?;
    let header = kernel.header.as_ref();
    cmdline::check(&source.cmdline, header)?;
    let loadable = kernel.resolve(cache).map_err(|error| error.of(path))?;
    let image = &loadable.image;
    image.check_room(low, initrd_size.unwrap_or(0)).map_err(|minimum| BootError::KernelDoesNotFit {
        path: path.clone(),
        memory_mib,
        minimum,
    })?;
    let initrd = source.initrd.as_ref().zip(initrd_size).map(|(initrd, size)| {
        let path = || initrd.path.clone();
        low.place_initrd(image.end, size, initrd_last(header, image.entry))
            .map(|addr| (initrd, addr, size))
            .map_err(|minimum| BootError::InitrdDoesNotFit { path: path(), memory_mib, minimum })
    });
    let initrd = initrd.transpose()?;

    image
        .load(loadable.unpacked.as_ref().unwrap_or(&source.kernel.file), ram)
        .map_err(|source| BootError::ReadKernel { path: path.clone(), source })?;
    if let Some((initrd, addr, size)) = initrd {
        initrd::load(initrd, ram, addr, size)?;
    }
    cmdline::write(ram, &source.cmdline)?;
    let params = Params { header, initrd: initrd.map(|(_, addr, size)| (addr, size)), rsdp: source.rsdp };
    match image.entry {
        Entry::Pvh(rip) => {
            params.write_start_info(ram)?;
            Ok(EntryPoint::Pvh { rip, start_info: layout::PVH_INFO })
        }
        Entry::Linux64(rip) => {
            params.write_zero_page(ram)?;
            long_mode::write_tables(ram)?;
            let (page_tables, gdt) = (layout::PAGE_TABLES, layout::GDT);
            Ok(EntryPoint::Linux64 { rip, zero_page: layout::ZERO_PAGE, page_tables, gdt })
        }
    }
}

/// The ELF inside a bzImage; `None` for a kernel that is one itself, or has to unpack itself.
///
/// # Errors
/// When it is no kernel, or damaged.
pub fn unpack(kernel: &BootFile) -> Result<Option<File>, BootError> {
    let resolved = Kernel::identify(kernel).and_then(|identified| identified.resolve(&KernelCache::off()));
    resolved.map(|loadable| loadable.unpacked).map_err(|error| error.of(&kernel.path))
}

/// The highest address a byte of the initrd may have.
fn initrd_last(header: Option<&SetupHeader>, entry: Entry) -> u64 {
    match (header, entry) {
        (Some(header), _) => header.initrd_last(),
        (None, Entry::Pvh(_)) => u32::MAX.into(),
        (None, Entry::Linux64(_)) => INITRD_LAST,
    }
}

/// Only a regular file has a size and can be read in any order.
fn regular(file: &File) -> io::Result<Metadata> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok(metadata)
}

fn regular_size(file: &File) -> io::Result<u64> {
    regular(file).map(|metadata| metadata.len())
}
