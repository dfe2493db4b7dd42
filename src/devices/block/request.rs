//! What a driver asks of a disk (virtio 1.2, section 5.2.6): read from its chain and checked, and how it is
//! answered.

use std::io;

use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress};

use crate::backend::Disk;
use crate::backend::disk::SECTOR;
use crate::memory::Ram;
use crate::virtio::Chain;

/// The limits of one discard: sectors per range (1 GiB), and ranges.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
pub const MAX_DISCARD_RANGES: u32 = 32;

/// The limits of one write-zeroes, smaller because the host may have to write them: 16 MiB, one range.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 15;
pub const MAX_ZEROES_RANGES: u32 = 1;

/// Why a request was not done.
pub enum Failure {
    /// It breaks a rule.
    Invalid,
    /// Nobody here knows how to do it.
    Unsupported,
    /// The host could not do it.
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Self::Unsupported,
            _ => Self::Host(error),
        }
    }
}

/// Bytes of the disk.
#[derive(Clone, Copy, Default)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

/// The ranges of a discard or write-zeroes: one at least.
pub struct Ranges {
    extents: [Extent; MAX_DISCARD_RANGES as usize],
    count: usize,
    /// Has any of them the unmap flag?
    pub unmap: bool,
}

impl Ranges {
    /// Reads what the chain of a [`Request::Discard`] holds.
    pub fn of_discard(chain: &Chain, disk: &Disk) -> Result<Self, Failure> {
        let ranges = Self::take(chain, disk, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS)?;
        if ranges.unmap { Err(Failure::Unsupported) } else { Ok(ranges) }
    }

    /// Reads what the chain of a [`Request::WriteZeroes`] holds.
    pub fn of_write_zeroes(chain: &Chain, disk: &Disk) -> Result<Self, Failure> {
        Self::take(chain, disk, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS)
    }

    /// Each is a `struct virtio_blk_discard_write_zeroes` of 16 bytes. All of them are checked before anything is done.
    fn take(chain: &Chain, disk: &Disk, max_ranges: u32, max_sectors: u32) -> Result<Self, Failure> {
        const BYTES: usize = 16;
        let mut raw = [0; BYTES * MAX_DISCARD_RANGES as usize];
        writable(disk)?;
        let len = chain.readable.len();
        let count = len / BYTES;
        if len == 0 || !len.is_multiple_of(BYTES) || count > max_ranges as usize {
            return Err(Failure::Invalid);
        }
        chain.readable.copy_to(&mut raw);
        let mut ranges = Self { extents: [Extent::default(); MAX_DISCARD_RANGES as usize], count, unmap: false };
        for (range, raw) in ranges.extents[..count].iter_mut().zip(raw.chunks_exact(BYTES)) {
            let sector = u64::from_le_bytes(raw[..8].try_into().expect("eight bytes"));
            let sectors = u32::from_le_bytes(raw[8..12].try_into().expect("four bytes"));
            let flags = u32::from_le_bytes(raw[12..].try_into().expect("four bytes"));
            if flags & !blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors == 0 || sectors > max_sectors {
                return Err(Failure::Invalid);
            }
            ranges.unmap |= flags != 0;
            *range = extent(disk, sector, u64::from(sectors) * SECTOR)?;
        }
        Ok(ranges)
    }

    pub fn extents(&self) -> &[Extent] {
        &self.extents[..self.count]
    }
}

/// A request, as its header says.
#[derive(Clone, Copy)]
pub enum Request {
    /// Fill the writable buffers from this byte on.
    Read {
        offset: u64,
    },
    /// Write the readable buffers from this byte on.
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    /// Give up the storage of [`Ranges::of_discard`].
    Discard,
    /// Write zeroes to [`Ranges::of_write_zeroes`].
    WriteZeroes,
}

impl Request {
    /// Takes the header off the chain, whose status byte is off already. What is to be read or written is there,
    /// and may be.
    pub fn take(chain: &mut Chain, disk: &Disk) -> Result<Self, Failure> {
        let mut header = [0; 16];
        if chain.readable.copy_to(&mut header) < header.len() {
            return Err(Failure::Invalid);
        }
        chain.readable.trim_front(header.len());
        // Bytes 4 to 7 are a priority, which legacy drivers set.
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        match kind {
            blk::VIRTIO_BLK_T_IN => {
                Ok(Self::Read { offset: extent(disk, sector, chain.writable.len() as u64)?.offset })
            }
            blk::VIRTIO_BLK_T_OUT => {
                writable(disk)?;
                Ok(Self::Write { offset: extent(disk, sector, chain.readable.len() as u64)?.offset })
            }
            blk::VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            blk::VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            blk::VIRTIO_BLK_T_DISCARD => Ok(Self::Discard),
            blk::VIRTIO_BLK_T_WRITE_ZEROES => Ok(Self::WriteZeroes),
            _ => Err(Failure::Unsupported),
        }
    }
}

/// Checks that `len` bytes from `sector` on are whole sectors of the disk.
fn extent(disk: &Disk, sector: u64, len: u64) -> Result<Extent, Failure> {
    let offset = sector.checked_mul(SECTOR).ok_or(Failure::Invalid)?;
    let end = offset.checked_add(len).ok_or(Failure::Invalid)?;
    if !len.is_multiple_of(SECTOR) || end > disk.bytes() {
        return Err(Failure::Invalid);
    }
    Ok(Extent { offset, len })
}

fn writable(disk: &Disk) -> Result<(), Failure> {
    if disk.read_only() { Err(Failure::Invalid) } else { Ok(()) }
}

/// Where a request's answer goes.
#[derive(Clone, Copy)]
pub struct Answer {
    status_at: u64,
    /// Bytes in front of the status byte.
    room: usize,
}

impl Answer {
    /// Takes the status byte off the chain; `None` if there is none, and so no way to answer but to give the
    /// chain back.
    pub fn take(chain: &mut Chain) -> Option<Self> {
        let status_at = chain.writable.last_byte()?;
        let room = chain.writable.len() - 1;
        chain.writable.truncate(room);
        Some(Self { status_at, room })
    }

    /// Writes the status of a request that wrote so many bytes of its data buffers; returns the length for the
    /// used ring.
    pub fn give(self, ram: &Ram, result: &Result<usize, Failure>) -> u32 {
        let (status, written) = match result {
            Ok(written) => (blk::VIRTIO_BLK_S_OK, *written),
            Err(Failure::Unsupported) => (blk::VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Invalid | Failure::Host(_)) => (blk::VIRTIO_BLK_S_IOERR, 0),
        };
        // It was in guest memory when the chain was popped, and RAM does not go away.
        let _ = ram.write_obj(status as u8, GuestAddress(self.status_at));
        // The length says how many bytes at the front are valid: with a gap before it, the status does not count.
        if written == self.room { written as u32 + 1 } else { written as u32 }
    }
}
