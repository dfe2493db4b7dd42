//! The VM generation ID (Microsoft, "Virtual Machine Generation ID"): 16 random bytes that are others whenever a VM goes on
//! from a saved state, so that its guest knows that what it takes for random may be known to another.
//!
//! They lie in guest memory that is reserved; ACPI tells where, and that they have changed.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::RamRegions;

/// Bytes of it.
pub const SIZE: usize = 16;

/// Writes a new one to guest memory.
///
/// # Errors
/// When the host has no random numbers, or the memory is not there.
pub fn renew(ram: &RamRegions) -> io::Result<()> {
    let mut id = [0; SIZE];
    // So few bytes come at once.
    getrandom(&mut id, GetRandomFlags::empty())?;
    ram.write_slice(&id, GuestAddress(layout::GENERATION_ID)).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;

    #[test]
    fn each_is_another_and_lies_where_it_is_declared() {
        let ram = anonymous(&layout::ram_ranges(2 << 20)).unwrap();
        let mut seen = vec![[0; SIZE]];
        for _ in 0..3 {
            renew(&ram).unwrap();
            let mut id = [0; SIZE];
            ram.read_slice(&mut id, GuestAddress(layout::GENERATION_ID)).unwrap();
            assert!(!seen.contains(&id));
            seen.push(id);
        }
        assert_eq!(layout::GENERATION_ID % 8, 0);
    }
}
