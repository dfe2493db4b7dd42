//! The initrd: any file, read to where the kernel can reach it.

use std::io;

use super::error::BootError;
use super::sparse::read_to_guest;
use super::{BootFile, regular_size};
use crate::memory::RamRegions;

/// Bytes of the initrd.
pub fn size(initrd: &BootFile) -> Result<u64, BootError> {
    match regular_size(&initrd.file) {
        Ok(0) => Err(BootError::InitrdEmpty { path: initrd.path.clone() }),
        Ok(size) => Ok(size),
        Err(source) => Err(unreadable(initrd, source)),
    }
}

/// Reads the `size` bytes of the initrd to the guest address found for it.
pub fn load(initrd: &BootFile, ram: &RamRegions, addr: u64, size: u64) -> Result<(), BootError> {
    read_to_guest(&initrd.file, 0..size, ram, addr).map_err(|source| unreadable(initrd, source))
}

fn unreadable(initrd: &BootFile, source: io::Error) -> BootError {
    BootError::ReadInitrd { path: initrd.path.clone(), source }
}
