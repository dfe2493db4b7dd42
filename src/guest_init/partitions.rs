//! The identifiers of a disk's partitions: GUID partition tables (UEFI 2.10, 5.3) and the older ones of DOS.

use std::io;

use super::superblock::format_uuid;

/// An open disk, or what stands for one.
pub trait Read {
    /// Reads exactly `bytes.len()` bytes at `offset`.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

impl Read for std::fs::File {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, bytes, offset)
    }
}

/// What a partition may be asked for by.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// PARTUUID: lower case; for a DOS partition the disk's signature and the number, as Linux has it.
    pub uuid: String,
    /// PARTLABEL, of GUID partition tables only.
    pub label: String,
}

const ENTRY: usize = 128;
/// Larger tables are legal, and nobody has them.
const MAX_ENTRIES: u32 = 1024;

/// The names of partition `number` (from 1), if the disk has such a one.
pub fn names(disk: &impl Read, sector: u64, number: u32) -> Option<Names> {
    gpt(disk, sector, number).or_else(|| dos(disk, number))
}

fn gpt(disk: &impl Read, sector: u64, number: u32) -> Option<Names> {
    let mut header = [0; 92];
    disk.read_at(sector, &mut header).ok()?;
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let table = u64::from_le_bytes(header[72..80].try_into().expect("eight bytes"));
    let (count, size) = (u32_at(80).min(MAX_ENTRIES), u32_at(84));
    if !header.starts_with(b"EFI PART") || number == 0 || number > count || (size as usize) < ENTRY {
        return None;
    }
    let at = u64::from(number - 1) * u64::from(size);
    let mut entry = [0; ENTRY];
    disk.read_at(table.checked_mul(sector)?.checked_add(at)?, &mut entry).ok()?;
    if entry[..16] == [0; 16] {
        return None;
    }
    let mut uuid: [u8; 16] = entry[16..32].try_into().expect("16 bytes");
    // The first three fields are little endian.
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    let label = entry[56..].chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|c| *c != 0);
    let label = char::decode_utf16(label).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
    Some(Names { uuid: format_uuid(&uuid), label })
}

fn dos(disk: &impl Read, number: u32) -> Option<Names> {
    let mut sector = [0; 512];
    disk.read_at(0, &mut sector).ok()?;
    let signature = u32::from_le_bytes(sector[440..444].try_into().expect("four bytes"));
    let valid = sector[510..] == [0x55, 0xaa] && signature != 0;
    valid.then(|| Names { uuid: format!("{signature:08x}-{number:02x}"), label: String::new() })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Read for Vec<u8> {
        fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
            let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
            let end = start.checked_add(bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            bytes.copy_from_slice(self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    pub fn disk_with_gpt(sector: usize) -> Vec<u8> {
        let mut disk = vec![0; 64 << 10];
        disk[sector..sector + 8].copy_from_slice(b"EFI PART");
        disk[sector + 72] = 2;
        disk[sector + 80] = 128;
        disk[sector + 84] = 128;
        let entry = 2 * sector + 128;
        disk[entry] = 1;
        for i in 0..16 {
            disk[entry + 16 + i] = i as u8;
        }
        for (i, byte) in b"root".iter().enumerate() {
            disk[entry + 56 + 2 * i] = *byte;
        }
        disk
    }

    #[test]
    fn the_second_partition_of_a_guid_table() {
        for sector in [512, 4096] {
            let disk = disk_with_gpt(sector);
            let found = names(&disk, sector as u64, 2).unwrap();
            assert_eq!(found, Names { uuid: "03020100-0504-0706-0809-0a0b0c0d0e0f".into(), label: "root".into() });
            assert_eq!(names(&disk, sector as u64, 1), None);
            assert_eq!(names(&disk, sector as u64, 129), None);
        }
    }

    #[test]
    fn dos_partitions_have_the_disks_signature() {
        let mut disk = vec![0; 512];
        disk[440..444].copy_from_slice(&0xabcd_1234u32.to_le_bytes());
        assert_eq!(names(&disk, 512, 3), None);
        disk[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(names(&disk, 512, 3).unwrap().uuid, "abcd1234-03");
    }

    proptest! {
        #[test]
        fn any_bytes_may_be_there(noise in proptest::collection::vec(any::<u8>(), 0..96), at in 0usize..96, number: u32, short in 0usize..2048) {
            let mut disk = disk_with_gpt(512);
            for (to, from) in disk[512 + at..].iter_mut().zip(&noise) {
                *to = *from;
            }
            let _ = names(&disk, 512, number);
            disk.truncate(short);
            let _ = names(&disk, 512, number);
        }
    }
}
