//! A GUID partition table (UEFI 2.10, section 5.3) on a disk that becomes larger or smaller.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

pub const SECTOR: u64 = 512;
/// Sectors that partitions begin at multiples of.
const ALIGNMENT: u64 = 2048;
const SIGNATURE: &[u8; 8] = b"EFI PART";
const HEADER_LEN: usize = 92;
/// Most bytes of entries: 128 of 128 bytes are usual.
const MAX_ENTRIES: u64 = 1 << 20;
/// Of the first entry of the table that old tools see: the type of one that covers a GPT disk, and where it is.
const PROTECTIVE: u8 = 0xee;
const PROTECTIVE_TYPE: usize = 446 + 4;
const PROTECTIVE_LEN: usize = 446 + 12;

#[derive(Debug, Error)]
pub enum GptError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("its GPT is damaged: {0}")]
    Damaged(&'static str),
    #[error("its last partition begins at byte {0}, behind the new end")]
    NoRoom(u64),
}

/// A table that was read, and is as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpt {
    header: Vec<u8>,
    entries: Vec<u8>,
    entry_len: usize,
}

/// A partition, by its first and its last sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Beginning with 1, as guests number them.
    pub number: usize,
    pub first: u64,
    pub last: u64,
}

impl Partition {
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.first * SECTOR
    }

    #[must_use]
    pub fn len(&self) -> u64 {
        (self.last - self.first + 1) * SECTOR
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Where the header's fields are.
mod field {
    pub const HEADER_LEN: usize = 12;
    pub const CRC: usize = 16;
    pub const OWN_LBA: usize = 24;
    pub const OTHER_LBA: usize = 32;
    pub const FIRST_USABLE: usize = 40;
    pub const LAST_USABLE: usize = 48;
    pub const ENTRIES_LBA: usize = 72;
    pub const ENTRY_COUNT: usize = 80;
    pub const ENTRY_LEN: usize = 84;
    pub const ENTRIES_CRC: usize = 88;
}

/// Of an entry: its first and last sector. One without a type is none.
const FIRST: usize = 32;
const LAST: usize = 40;

impl Gpt {
    /// The table of a disk of `size` bytes; none if there is none.
    ///
    /// # Errors
    /// When it is damaged, or the disk cannot be read.
    pub fn read(disk: &File, size: u64) -> Result<Option<Self>, GptError> {
        let sectors = size / SECTOR;
        let mut header = vec![0; SECTOR as usize];
        if sectors < 3 {
            return Ok(None);
        }
        disk.read_exact_at(&mut header, SECTOR)?;
        if !header.starts_with(SIGNATURE) {
            return Ok(None);
        }
        let damaged = |what| Err(GptError::Damaged(what));
        let len = u32_at(&header, field::HEADER_LEN) as usize;
        if !(HEADER_LEN..=SECTOR as usize).contains(&len) {
            return damaged("the length of its header makes no sense");
        }
        if header_crc(&header, len) != u32_at(&header, field::CRC) {
            return damaged("the checksum of its header is wrong");
        }
        let count = u64::from(u32_at(&header, field::ENTRY_COUNT));
        let entry_len = u64::from(u32_at(&header, field::ENTRY_LEN));
        if entry_len < 128 || !entry_len.is_multiple_of(8) || count == 0 || count * entry_len > MAX_ENTRIES {
            return damaged("the number or length of its entries makes no sense");
        }
        let at = u64_at(&header, field::ENTRIES_LBA);
        let mut entries = vec![0; (count * entry_len) as usize];
        if u64_at(&header, field::OWN_LBA) != 1 || at < 2 || at >= sectors {
            return damaged("it is not where it says it is");
        }
        disk.read_exact_at(&mut entries, at * SECTOR)?;
        if crc32fast::hash(&entries) != u32_at(&header, field::ENTRIES_CRC) {
            return damaged("the checksum of its entries is wrong");
        }
        let table = Self { header, entries, entry_len: entry_len as usize };
        let (first, last) = (u64_at(&table.header, field::FIRST_USABLE), u64_at(&table.header, field::LAST_USABLE));
        if first > last || last >= sectors || first < at + table.entry_sectors() {
            return damaged("what it has for partitions is not on the disk");
        }
        if table.partitions().any(|part| part.first < first || part.first > part.last || part.last > last) {
            return damaged("a partition is not on the disk");
        }
        Ok(Some(table))
    }

    fn entry_sectors(&self) -> u64 {
        (self.entries.len() as u64).div_ceil(SECTOR)
    }

    pub fn partitions(&self) -> impl Iterator<Item = Partition> {
        let used = self.entries.chunks_exact(self.entry_len).enumerate().filter(|(_, entry)| entry[..16] != [0; 16]);
        used.map(|(index, entry)| Partition {
            number: index + 1,
            first: u64_at(entry, FIRST),
            last: u64_at(entry, LAST),
        })
    }

    /// The one that nothing is behind.
    #[must_use]
    pub fn last_partition(&self) -> Option<Partition> {
        self.partitions().max_by_key(|part| part.last)
    }

    /// The same table for a disk of `size` bytes, of which the last partition goes to the end.
    ///
    /// # Errors
    /// When that leaves nothing of the last partition.
    pub fn resized(&self, size: u64) -> Result<Self, GptError> {
        let mut table = self.clone();
        let last_sector = (size / SECTOR).saturating_sub(1);
        // The entries' copy and the header's are at the end.
        let last_usable = last_sector.saturating_sub(self.entry_sectors() + 1);
        if let Some(part) = self.last_partition() {
            let aligned = (last_usable + 1) / ALIGNMENT * ALIGNMENT;
            // A disk that became no larger by what can be aligned keeps what it has.
            let last =
                if aligned > part.last || part.last > last_usable { aligned.saturating_sub(1) } else { part.last };
            if last < part.first {
                return Err(GptError::NoRoom(part.offset()));
            }
            put(&mut table.entries, (part.number - 1) * self.entry_len + LAST, &last.to_le_bytes());
        }
        put(&mut table.header, field::OTHER_LBA, &last_sector.to_le_bytes());
        put(&mut table.header, field::LAST_USABLE, &last_usable.to_le_bytes());
        let crc = crc32fast::hash(&table.entries);
        put(&mut table.header, field::ENTRIES_CRC, &crc.to_le_bytes());
        seal(&mut table.header);
        Ok(table)
    }

    /// Writes the table, its copy at the end first: until the last write, the table that was there is what guests read.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, disk: &File) -> io::Result<()> {
        let last_sector = u64_at(&self.header, field::OTHER_LBA);
        let copy_at = last_sector - self.entry_sectors();
        let mut copy = self.header.clone();
        put(&mut copy, field::OWN_LBA, &last_sector.to_le_bytes());
        put(&mut copy, field::OTHER_LBA, &1u64.to_le_bytes());
        put(&mut copy, field::ENTRIES_LBA, &copy_at.to_le_bytes());
        seal(&mut copy);
        disk.write_all_at(&self.entries, copy_at * SECTOR)?;
        disk.write_all_at(&copy, last_sector * SECTOR)?;
        disk.sync_data()?;
        let mut protective = vec![0; SECTOR as usize];
        disk.read_exact_at(&mut protective, 0)?;
        if protective[PROTECTIVE_TYPE] == PROTECTIVE {
            let sectors = u32::try_from(last_sector).unwrap_or(u32::MAX);
            put(&mut protective, PROTECTIVE_LEN, &sectors.to_le_bytes());
            disk.write_all_at(&protective, 0)?;
        }
        disk.write_all_at(&self.entries, u64_at(&self.header, field::ENTRIES_LBA) * SECTOR)?;
        disk.write_all_at(&self.header, SECTOR)?;
        disk.sync_data()
    }
}

fn header_crc(header: &[u8], len: usize) -> u32 {
    let mut header = header[..len].to_vec();
    put(&mut header, field::CRC, &[0; 4]);
    crc32fast::hash(&header)
}

fn seal(header: &mut [u8]) {
    let crc = header_crc(header, u32_at(header, field::HEADER_LEN) as usize);
    put(header, field::CRC, &crc.to_le_bytes());
}
