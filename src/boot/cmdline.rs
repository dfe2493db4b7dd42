//! The kernel command line.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::bzimage::SetupHeader;
use super::error::BootError;
use crate::memory::RamRegions;
use crate::platform::layout;

/// Bytes x86 Linux takes when its file does not tell: COMMAND_LINE_SIZE is 2048, a NUL included.
pub const ELF_LIMIT: u32 = 2047;

/// Checks a command line against what the kernel takes.
pub fn check(cmdline: &str, header: Option<&SetupHeader>) -> Result<(), BootError> {
    let kernels = header.map_or(ELF_LIMIT, SetupHeader::cmdline_size) as usize;
    let limit = kernels.min(layout::CMDLINE_MAX as usize - 1);
    if cmdline.len() > limit {
        return Err(BootError::CmdlineTooLong { length: cmdline.len(), limit });
    }
    for (character, what) in [('\0', "a NUL character"), ('\n', "a line break"), ('\r', "a line break")] {
        if cmdline.contains(character) {
            return Err(BootError::CmdlineCharacter { what });
        }
    }
    Ok(())
}

/// Writes a checked command line, and the NUL behind it, to where both boot protocols are told it is.
pub fn write(ram: &RamRegions, cmdline: &str) -> Result<(), GuestMemoryError> {
    ram.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    ram.write_slice(&[0], GuestAddress(layout::CMDLINE + cmdline.len() as u64))
}
