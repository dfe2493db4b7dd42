//! virtio-blk over a raw disk (virtio 1.2, section 5.2): one queue, requests served in order.

use std::io;
use std::path::Path;

use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromZeros, Immutable, IntoBytes, little_endian as le};

use super::front::Front;
use super::worker::{Engine, Served, Turn, Worker, serve_each};
use crate::backend::Disk;
use crate::backend::disk::SECTOR;
use crate::config::CacheMode;
use crate::memory::Ram;
use crate::observe::guest_warning;
use crate::virtio::{Chain, DeviceKind, RingError, Virtqueue, feature};

const QUEUE_SIZE: u16 = 256;

/// A chain holds a header and a status byte besides the data.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

const ID_BYTES: usize = blk::VIRTIO_BLK_ID_BYTES as usize;

/// The limits of one discard: sectors per range (1 GiB), and ranges.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const MAX_DISCARD_RANGES: u32 = 32;

/// The limits of one write-zeroes, smaller because the host may have to write them: 16 MiB, one range.
const MAX_ZEROES_SECTORS: u32 = 1 << 15;
const MAX_ZEROES_RANGES: u32 = 1;

/// `struct virtio_blk_config`, to the end of what we offer.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: le::U64,
    size_max: le::U32,
    seg_max: le::U32,
    geometry: [u8; 4],
    blk_size: le::U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: le::U16,
    opt_io_size: le::U32,
    writeback: u8,
    unused0: u8,
    num_queues: le::U16,
    max_discard_sectors: le::U32,
    max_discard_seg: le::U32,
    discard_sector_alignment: le::U32,
    max_write_zeroes_sectors: le::U32,
    max_write_zeroes_seg: le::U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// A disk that tells its guest `id`, cut to 20 bytes, when asked for its serial number; without one, a
/// number made from the path.
pub fn device(name: String, disk: Disk, id: Option<&str>, cache: CacheMode) -> io::Result<Front> {
    let mut features = feature::RING
        | 1 << blk::VIRTIO_BLK_F_SEG_MAX
        | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
        | 1 << blk::VIRTIO_BLK_F_TOPOLOGY;
    if disk.read_only() {
        features |= 1 << blk::VIRTIO_BLK_F_RO;
    } else {
        // Whether the host's file system can discard is only known when it is tried: a request that it
        // refuses is answered with UNSUPP. Zeroes can always be written.
        features |= 1 << blk::VIRTIO_BLK_F_DISCARD | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
        if cache == CacheMode::Writeback {
            features |= 1 << blk::VIRTIO_BLK_F_FLUSH;
        }
    }
    // The host's block in sectors, if it is a sensible number: a power of two up to 64 KiB.
    let block = disk.block_size() / SECTOR;
    let block = if block.is_power_of_two() && block <= 128 { block as u32 } else { 1 };
    let mut config = Config::new_zeroed();
    config.capacity = (disk.bytes() / SECTOR).into();
    config.seg_max = MAX_SEGMENTS.into();
    config.blk_size = (SECTOR as u32).into();
    config.physical_block_exp = block.ilog2() as u8;
    config.min_io_size = (block as u16).into();
    if !disk.read_only() {
        config.max_discard_sectors = MAX_DISCARD_SECTORS.into();
        config.max_discard_seg = MAX_DISCARD_RANGES.into();
        config.discard_sector_alignment = block.into();
        config.max_write_zeroes_sectors = MAX_ZEROES_SECTORS.into();
        config.max_write_zeroes_seg = MAX_ZEROES_RANGES.into();
        config.write_zeroes_may_unmap = 1;
    }
    let engine = BlockEngine::new(name.clone(), disk, id, cache);
    let worker = Worker::spawn(&name, Box::new(engine), &[(0, QUEUE_SIZE)])?;
    Ok(Front::new(DeviceKind::Block, name, features, config.as_bytes().to_vec(), vec![Box::new(worker)]))
}

/// Why a request was not done.
enum Failure {
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
struct Extent {
    offset: u64,
    len: u64,
}

pub(super) struct BlockEngine {
    name: String,
    disk: Disk,
    id: [u8; ID_BYTES],
    cache: CacheMode,
    /// The driver does not flush, so every write has to last by itself.
    write_through: bool,
}

impl BlockEngine {
    pub(super) fn new(name: String, disk: Disk, id: Option<&str>, cache: CacheMode) -> Self {
        let id = id.map_or_else(|| id_from_path(disk.path()), str::to_owned);
        let mut padded = [0; ID_BYTES];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self { name, disk, id: padded, cache, write_through: false }
    }

    /// Does what the chain asks and fills in its status byte; returns how many bytes were written in front.
    fn request(&mut self, chain: &mut Chain, queue: &mut Virtqueue) -> u32 {
        // Without a status byte there is no way to answer but to give the chain back.
        let Some(status_at) = chain.writable.last_byte() else {
            guest_warning!("{}: a request without a status byte", self.name);
            return 0;
        };
        let room = chain.writable.len() - 1;
        chain.writable.truncate(room);
        let (status, written) = match self.execute(chain, queue) {
            Ok(written) => (blk::VIRTIO_BLK_S_OK, written),
            Err(Failure::Unsupported) => (blk::VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Invalid) => (blk::VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Host(error)) => {
                guest_warning!("{}: {}: {error}", self.name, self.disk.path().display());
                (blk::VIRTIO_BLK_S_IOERR, 0)
            }
        };
        // It was in guest memory when the chain was popped, and RAM does not go away.
        let _ = queue.ram().write_obj(status as u8, GuestAddress(status_at));
        // The length says how many bytes at the front are valid: with a gap before it, the status does not count.
        if written == room { written as u32 + 1 } else { written as u32 }
    }

    /// Returns how many bytes of the chain's data buffers were written.
    fn execute(&mut self, chain: &mut Chain, queue: &mut Virtqueue) -> Result<usize, Failure> {
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
                let len = chain.writable.len();
                let at = self.extent(sector, len as u64)?.offset;
                let unannounced = queue.unannounced();
                let mut announce = || queue.interrupt();
                self.disk.read(&mut chain.writable, at, unannounced.then_some(&mut announce))?;
                Ok(len)
            }
            blk::VIRTIO_BLK_T_OUT => {
                self.writable()?;
                let at = self.extent(sector, chain.readable.len() as u64)?.offset;
                let unannounced = queue.unannounced();
                let mut announce = || queue.interrupt();
                self.disk.write(&mut chain.readable, at, unannounced.then_some(&mut announce))?;
                self.settle(queue)
            }
            blk::VIRTIO_BLK_T_FLUSH => {
                if self.cache == CacheMode::Writeback {
                    queue.interrupt();
                    self.disk.flush()?;
                }
                Ok(0)
            }
            blk::VIRTIO_BLK_T_GET_ID => Ok(chain.writable.copy_from(&self.id)),
            blk::VIRTIO_BLK_T_DISCARD => self.discard(chain, queue),
            blk::VIRTIO_BLK_T_WRITE_ZEROES => self.write_zeroes(chain, queue),
            _ => Err(Failure::Unsupported),
        }
    }

    fn discard(&self, chain: &Chain, queue: &mut Virtqueue) -> Result<usize, Failure> {
        let mut ranges = [Extent::default(); MAX_DISCARD_RANGES as usize];
        let (ranges, unmap) = self.ranges(chain, &mut ranges, MAX_DISCARD_SECTORS)?;
        if unmap {
            return Err(Failure::Unsupported);
        }
        queue.interrupt();
        for range in ranges {
            self.disk.discard(range.offset, range.len)?;
        }
        self.settle(queue)
    }

    fn write_zeroes(&self, chain: &Chain, queue: &mut Virtqueue) -> Result<usize, Failure> {
        let mut ranges = [Extent::default(); MAX_ZEROES_RANGES as usize];
        let (ranges, unmap) = self.ranges(chain, &mut ranges, MAX_ZEROES_SECTORS)?;
        queue.interrupt();
        for range in ranges {
            self.disk.write_zeroes(range.offset, range.len, unmap)?;
        }
        self.settle(queue)
    }

    /// Reads the ranges of a discard or write-zeroes: `struct virtio_blk_discard_write_zeroes`, 16 bytes each.
    /// All of them are checked before anything is done. Also returns whether any of them has the unmap flag.
    fn ranges<'a>(
        &self,
        chain: &Chain,
        ranges: &'a mut [Extent],
        max_sectors: u32,
    ) -> Result<(&'a [Extent], bool), Failure> {
        const BYTES: usize = 16;
        let mut raw = [0; BYTES * MAX_DISCARD_RANGES as usize];
        self.writable()?;
        let len = chain.readable.len();
        if len == 0 || !len.is_multiple_of(BYTES) || len / BYTES > ranges.len() {
            return Err(Failure::Invalid);
        }
        chain.readable.copy_to(&mut raw);
        let ranges = &mut ranges[..len / BYTES];
        let mut unmap = false;
        for (range, raw) in ranges.iter_mut().zip(raw.chunks_exact(BYTES)) {
            let sector = u64::from_le_bytes(raw[..8].try_into().expect("eight bytes"));
            let sectors = u32::from_le_bytes(raw[8..12].try_into().expect("four bytes"));
            let flags = u32::from_le_bytes(raw[12..].try_into().expect("four bytes"));
            if flags & !blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors == 0 || sectors > max_sectors {
                return Err(Failure::Invalid);
            }
            unmap |= flags != 0;
            *range = self.extent(sector, u64::from(sectors) * SECTOR)?;
        }
        Ok((ranges, unmap))
    }

    /// Checks that `len` bytes from `sector` on are whole sectors of the disk.
    fn extent(&self, sector: u64, len: u64) -> Result<Extent, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Invalid)?;
        let end = offset.checked_add(len).ok_or(Failure::Invalid)?;
        if !len.is_multiple_of(SECTOR) || end > self.disk.bytes() {
            return Err(Failure::Invalid);
        }
        Ok(Extent { offset, len })
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.disk.read_only() { Err(Failure::Invalid) } else { Ok(()) }
    }

    /// After a change of the disk: without a flush to come, it has to last already.
    fn settle(&self, queue: &mut Virtqueue) -> Result<usize, Failure> {
        if self.write_through {
            queue.interrupt();
            self.disk.flush()?;
        }
        Ok(0)
    }
}

impl Engine for BlockEngine {
    fn start(&mut self, _index: u16, features: u64, _ram: &Ram) -> io::Result<()> {
        self.write_through = self.cache == CacheMode::Writeback && features & 1 << blk::VIRTIO_BLK_F_FLUSH == 0;
        Ok(())
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        serve_each(queue, chain, turn, |chain, queue| self.request(chain, queue))
    }
}

/// 16 hex digits that stay the same for the same path: its 64-bit FNV-1a hash.
fn id_from_path(path: &Path) -> String {
    let bytes = path.as_os_str().as_encoded_bytes();
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}
