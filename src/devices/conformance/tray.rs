//! Another disk behind a running device.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Ring, memory, readable, writable};
use super::specimens::{BlockEngine, DiskRequests};
use crate::backend::{Disk, DiskError, OpenDirectly};
use crate::config::CacheMode;
use crate::devices::Front;
use crate::devices::block::{BlockDevice, BlockOptions, Change, Tray};
use crate::virtio::VirtioDevice;

const LIMIT: Duration = Duration::from_secs(20);
const QUEUES: u16 = 2;

/// Where request `n` of a queue has its buffers, in 4 KiB.
fn area(queue: u16, n: u16) -> u64 {
    0x10_0000 + u64::from(queue) * 0x2_0000 + u64::from(n) * 0x1000
}

/// Two disks of different size and contents, the first of them in a device.
struct Bench {
    engine: BlockEngine,
    files: [DiskRequests; 2],
    /// The one that is in.
    disk: Arc<Disk>,
    at: usize,
    front: Front,
    tray: Tray,
    rings: Vec<Ring>,
}

fn fill(n: usize) -> u8 {
    0xa0 + n as u8
}

fn sectors(n: usize) -> u64 {
    [128, 256][n]
}

impl Bench {
    fn new(engine: BlockEngine) -> Self {
        let files = [0, 1].map(|n| {
            let file = DiskRequests::new(engine);
            file.file.as_file().write_all_at(&vec![fill(n); sectors(n) as usize * 512], 0).unwrap();
            file
        });
        let disk = files[0].open(false);
        let options = BlockOptions { id: None, cache: CacheMode::Writeback, queues: QUEUES };
        let BlockDevice { front, tray } = files[0].device_over(&disk, options);
        let ram = memory();
        let rings = (0..QUEUES).map(|index| Ring::new(&ram, index, 64, front.features())).collect();
        Self { engine, files, disk, at: 0, front, tray, rings }
    }

    fn start(&mut self) {
        for ring in &self.rings {
            ring.start(&mut self.front, None);
        }
    }

    /// Puts the other one in.
    fn change(&mut self) -> Arc<Change> {
        self.at = 1 - self.at;
        self.put_in(self.files[self.at].open(false))
    }

    /// Puts in the one that is in already.
    fn change_not(&mut self) -> Arc<Change> {
        let again = self.disk.with_size_of_now(&OpenDirectly, self.files[self.at].file.path());
        self.put_in(again.unwrap().unwrap().into())
    }

    fn put_in(&mut self, disk: Arc<Disk>) -> Arc<Change> {
        let rings = self.engine.rings(&disk, QUEUES);
        let old = std::mem::replace(&mut self.disk, disk);
        self.tray.change(old, &self.disk, rings, self.rings[0].events.clone(), Box::new(|| ()))
    }

    fn capacity(&self) -> u64 {
        let mut capacity = [0; 8];
        self.front.read_config(0, &mut capacity);
        u64::from_le_bytes(capacity)
    }

    /// Makes request `n` of a queue, of one sector.
    fn make(&mut self, queue: u16, n: u16, kind: u32, sector: u64) {
        let (ring, at) = (&mut self.rings[usize::from(queue)], area(queue, n));
        ring.ram.write_obj((u128::from(kind) | u128::from(sector) << 64).to_le(), GuestAddress(at)).unwrap();
        ring.ram.write_slice(&[0xee; 513], GuestAddress(at + 0x100)).unwrap();
        let data = match kind {
            blk::VIRTIO_BLK_T_IN => writable(at + 0x100, 512),
            _ => readable(at + 0x100, 512),
        };
        ring.chain(n * 4, &[readable(at, 16), data, writable(at + 0x300, 1)], false);
        ring.publish(n * 4);
    }

    /// The status and the first byte of data of request `n`, which has been answered.
    fn answer(&self, queue: u16, n: u16) -> (u8, u8) {
        let byte = |offset| self.rings[0].ram.read_obj(GuestAddress(area(queue, n) + offset)).unwrap();
        (byte(0x300), byte(0x100))
    }

    fn read(&mut self, queue: u16, sector: u64) -> (u8, u8) {
        self.make(queue, 0, blk::VIRTIO_BLK_T_IN, sector);
        let ring = &mut self.rings[usize::from(queue)];
        ring.kick();
        assert_eq!(ring.wait_used(1).len(), 1);
        self.answer(queue, 0)
    }
}

#[test]
fn the_driver_finds_the_other_disk_with_its_size() {
    for (engine, running) in BlockEngine::all().into_iter().flat_map(|engine| [(engine, true), (engine, false)]) {
        let mut bench = Bench::new(engine);
        if running {
            bench.start();
            assert_eq!((bench.read(0, 0), bench.read(1, 200).0), ((0, fill(0)), 1));
        }
        for round in 1..=6 {
            assert!(bench.change().is_done_within(LIMIT));
            assert_eq!(bench.capacity(), sectors(bench.at));
            assert_eq!(bench.rings[0].events.config_changes(), round);
            // The one that is out is anybody's, the one that is in is not.
            bench.files[1 - bench.at].open(false);
            let in_it = Disk::open(&OpenDirectly, bench.files[bench.at].file.path(), false);
            assert!(matches!(in_it, Err(DiskError::Locked { .. })));
            if running {
                for queue in 0..QUEUES {
                    assert_eq!(bench.read(queue, 3), (0, fill(bench.at)));
                    assert_eq!(bench.read(queue, 200).0, u8::from(bench.at == 0), "beyond the end, or not");
                }
            }
        }
        if !running {
            bench.start();
        }
        bench.make(1, 0, blk::VIRTIO_BLK_T_OUT, 5);
        bench.rings[1].kick();
        bench.rings[1].wait_used(1);
        let written = |n: usize| {
            let mut byte = [0];
            bench.files[n].file.as_file().read_exact_at(&mut byte, 5 * 512).unwrap();
            byte[0] == 0xee
        };
        assert_eq!([written(bench.at), written(1 - bench.at)], [true, false]);
    }
}

#[test]
fn requests_around_a_change_are_all_answered() {
    for engine in BlockEngine::all() {
        let mut bench = Bench::new(engine);
        bench.start();
        for round in 0..100 {
            let before = bench.at;
            for queue in 0..QUEUES {
                for n in 0..8 {
                    bench.make(queue, n, blk::VIRTIO_BLK_T_IN, n.into());
                    if round % 2 == 0 {
                        bench.rings[usize::from(queue)].kick();
                    }
                }
                bench.rings[usize::from(queue)].kick();
            }
            let change = bench.change();
            if round % 3 == 0 {
                // Another one behind it.
                assert!(bench.change_not().is_done_within(LIMIT));
            }
            assert!(change.is_done_within(LIMIT));
            for queue in 0..QUEUES {
                for n in 8..16 {
                    bench.make(queue, n, blk::VIRTIO_BLK_T_IN, n.into());
                }
                bench.rings[usize::from(queue)].kick();
                assert_eq!(bench.rings[usize::from(queue)].wait_used(16).len(), 16);
                for n in 0..16 {
                    let (status, byte) = bench.answer(queue, n);
                    let late = n >= 8;
                    let expected = byte == fill(bench.at) || !late && [before, 1 - before].map(fill).contains(&byte);
                    assert!(status == 0 && expected, "{engine:?}, request {n}: {status}, {byte:#x}");
                }
            }
        }
        assert_eq!(bench.rings[0].events.broken(), None);
    }
}
