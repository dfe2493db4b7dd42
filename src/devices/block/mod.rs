//! virtio-blk (virtio 1.2, section 5.2): one or more queues over one disk, a thread each.

mod request;
mod sync;
mod tray;
mod uring;

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;
use zerocopy::{FromZeros, Immutable, IntoBytes, little_endian as le};

use self::request::{MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS};
pub(crate) use self::sync::SyncEngine;
pub use self::tray::{BlockStateV1, Change, Tray};
use self::uring::{Pending, UringEngine};
use super::front::{Front, QueueServer};
use super::worker::{Engine, Worker};
use crate::backend::disk::uring::{DEPTH, Uring};
use crate::backend::disk::{DiskError, SECTOR};
use crate::backend::{Disk, HostFiles, Limiter};
use crate::config::{CacheMode, IoEngine};
use crate::virtio::{DeviceKind, feature};

const QUEUE_SIZE: u16 = 256;

/// A chain holds a header and a status byte besides the data.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

const ID_BYTES: usize = blk::VIRTIO_BLK_ID_BYTES as usize;

/// `struct virtio_blk_config`, to the end of what we offer.
#[derive(Clone, Copy, FromZeros, IntoBytes, Immutable)]
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

#[derive(Debug, Clone, Copy)]
pub struct BlockOptions<'a> {
    /// What the guest is told when it asks for the serial number, cut to 20 bytes; without one, a number made
    /// from the path.
    pub id: Option<&'a str>,
    pub cache: CacheMode,
    /// How many queues there are, one at least.
    pub queues: u16,
}

/// The rings of a disk's queues, made while all rights are there.
pub struct Rings {
    rings: Vec<Uring<Pending>>,
    /// Everything goes through them, even what the host can do at once: a test of the rings.
    pub(crate) only: bool,
}

impl Rings {
    /// Makes a ring for each queue; none if the disk is to do without.
    ///
    /// # Errors
    /// If rings are wanted by name and cannot be had.
    pub fn new(disk: &Arc<Disk>, files: &dyn HostFiles, engine: IoEngine, queues: u16) -> Result<Rings, DiskError> {
        let make = || {
            let file = disk.open_again(files);
            let file = file.map_err(|source| DiskError::Uring { path: disk.path().to_owned(), source })?;
            (0..queues).map(|_| Uring::new(disk, &file, DEPTH)).collect::<Result<_, _>>()
        };
        let rings = match engine {
            IoEngine::Sync => Vec::new(),
            IoEngine::IoUring => match make() {
                // Made in a jail after the start: rather slower than not at all.
                Err(error @ DiskError::NoRing { .. }) => {
                    tracing::warn!("{error}: one request at a time");
                    Vec::new()
                }
                rings => rings?,
            },
            // Where the host cannot tell what has to wait, every request would go a long way round.
            IoEngine::Auto if !disk.tells_ready_reads() => Vec::new(),
            IoEngine::Auto => make().unwrap_or_else(|error| {
                let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::info!("{error} ({why}): one request at a time");
                Vec::new()
            }),
        };
        Ok(Self { rings, only: false })
    }

    /// The engine of queue `index`: with one of the rings, if there are any.
    pub(crate) fn engine(&mut self, index: u16, sync: SyncEngine) -> Box<dyn Engine> {
        let Some(ring) = self.rings.pop() else { return Box::new(sync) };
        let engine = UringEngine::new(index, ring, sync, !self.only);
        Box::new(engine)
    }
}

/// A device, and where its disk is put in.
pub struct BlockDevice {
    pub front: Front,
    pub tray: Tray,
}

/// Makes the device, and its threads: with a ring for each queue, or with none. All queues share the limiter.
pub fn device(
    name: String,
    disk: &Arc<Disk>,
    mut rings: Rings,
    options: BlockOptions<'_>,
    limiter: Arc<Limiter>,
) -> io::Result<BlockDevice> {
    let (features, config) = offer(disk, options);
    let id = padded_id(options.id, disk.path());
    let mut tray = Tray::new(name.clone(), id, options.cache, limiter, config);
    let mut serve = |index| -> io::Result<Box<dyn QueueServer>> {
        let thread = if options.queues == 1 { name.clone() } else { format!("{name}.{index}") };
        let worker = Worker::spawn(&thread, tray.engine(index, disk, &mut rings), &[(index, QUEUE_SIZE)])?;
        tray.serve(worker.line());
        Ok(Box::new(worker))
    };
    let servers = (0..options.queues).map(&mut serve).collect::<io::Result<_>>()?;
    let front = Front::new(DeviceKind::Block, name, features, tray.config(), servers);
    Ok(BlockDevice { front, tray })
}

/// What the driver is told about the disk: features, and the configuration space.
fn offer(disk: &Disk, options: BlockOptions<'_>) -> (u64, Config) {
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
        if options.cache == CacheMode::Writeback {
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
    if options.queues > 1 {
        features |= 1 << blk::VIRTIO_BLK_F_MQ;
        config.num_queues = options.queues.into();
    }
    (features, config)
}

pub(super) fn padded_id(id: Option<&str>, path: &Path) -> [u8; ID_BYTES] {
    let id = id.map_or_else(|| id_from_path(path), str::to_owned);
    let mut padded = [0; ID_BYTES];
    for (to, from) in padded.iter_mut().zip(id.bytes()) {
        *to = from;
    }
    padded
}

/// 16 hex digits that stay the same for the same path: its 64-bit FNV-1a hash.
fn id_from_path(path: &Path) -> String {
    let bytes = path.as_os_str().as_encoded_bytes();
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}
