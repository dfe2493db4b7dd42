//! What is on a disk, as far as it matters to who makes the disk larger or smaller. All of it is the guest's word.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::gpt::{Gpt, GptError, Partition};

/// What fills a disk, or its last partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// ext2, ext3 or ext4, of so many bytes.
    Ext { bytes: u64, block_size: u64 },
    /// Something else that is known by name.
    Other(&'static str),
    /// Zeroes, or what nobody here knows.
    Unknown,
}

/// How a disk is divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub table: Option<Gpt>,
    /// The last partition, if there is a table with any.
    pub partition: Option<Partition>,
    pub content: Content,
}

impl Layout {
    /// Looks at a disk of `size` bytes.
    ///
    /// # Errors
    /// When its table is damaged, or the disk cannot be read.
    pub fn of(disk: &File, size: u64) -> Result<Self, GptError> {
        let table = Gpt::read(disk, size)?;
        let partition = table.as_ref().and_then(Gpt::last_partition);
        let content = match (&table, partition) {
            (Some(_), Some(part)) => content(disk, part.offset(), part.len())?,
            (Some(_), None) => Content::Unknown,
            (None, _) => match content(disk, 0, size)? {
                Content::Unknown if has_dos_table(disk, size)? => Content::Other("a DOS partition table"),
                content => content,
            },
        };
        Ok(Self { table, partition, content })
    }

    /// Where what fills it begins, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.partition.map_or(0, |part| part.offset())
    }
}

/// Bytes of the disk at `at`; none beyond its end.
fn read(disk: &File, at: u64, len: usize, end: u64) -> io::Result<Option<Vec<u8>>> {
    if at.checked_add(len as u64).is_none_or(|last| last > end) {
        return Ok(None);
    }
    let mut bytes = vec![0; len];
    disk.read_exact_at(&mut bytes, at)?;
    Ok(Some(bytes))
}

/// Marks of what is no ext file system: where, what, and of what.
const MARKS: [(u64, &[u8], &str); 5] = [
    (0, b"XFSB", "XFS"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
    (512, b"LABELONE", "an LVM volume"),
    (4086, b"SWAPSPACE2", "swap space"),
];

fn content(disk: &File, offset: u64, len: u64) -> io::Result<Content> {
    let end = offset.saturating_add(len);
    if let Some(superblock) = read(disk, offset.saturating_add(1024), 1024, end)?
        && let Some(ext) = ext(&superblock)
    {
        return Ok(ext);
    }
    for (at, mark, name) in MARKS {
        if read(disk, offset.saturating_add(at), mark.len(), end)?.is_some_and(|bytes| bytes == mark) {
            return Ok(Content::Other(name));
        }
    }
    Ok(Content::Unknown)
}

/// A superblock of ext2, ext3 or ext4 (the kernel's Documentation/filesystems/ext4/super.rst).
fn ext(superblock: &[u8]) -> Option<Content> {
    const MAGIC: [u8; 2] = [0x53, 0xef];
    const INCOMPAT_64BIT: u32 = 0x80;
    const INCOMPAT_JOURNAL_DEVICE: u32 = 0x8;
    let word = |at: usize| superblock.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    if superblock.get(56..58)? != MAGIC || word(96)? & INCOMPAT_JOURNAL_DEVICE != 0 {
        return None;
    }
    let high = if word(96)? & INCOMPAT_64BIT == 0 { 0 } else { word(0x150)? };
    let blocks = u64::from(high) << 32 | u64::from(word(4)?);
    let block_size = 1024u64.checked_shl(word(24)?).filter(|size| (1024..=65_536).contains(size))?;
    Some(Content::Ext { bytes: blocks.checked_mul(block_size)?, block_size })
}

fn has_dos_table(disk: &File, size: u64) -> io::Result<bool> {
    let Some(sector) = read(disk, 0, 512, size)? else { return Ok(false) };
    let types = [446, 462, 478, 494].map(|entry| sector[entry + 4]);
    Ok(sector[510..] == [0x55, 0xaa] && types.iter().any(|&kind| kind != 0))
}
