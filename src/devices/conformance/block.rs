//! Every kind of block request against a real file.

use std::os::unix::fs::{FileExt, MetadataExt};

use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Ring, memory, readable, writable};
use super::specimens::{BlockEngine, DiskRequests, SECTORS};
use crate::config::CacheMode;
use crate::devices::Front;
use crate::devices::block::BlockOptions;
use crate::virtio::{VirtioDevice, feature};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x10_1000;
const STATUS: u64 = 0x1f_f000;

struct Client {
    file: DiskRequests,
    device: Front,
    ring: Ring,
}

impl Client {
    fn new(engine: BlockEngine, read_only: bool, id: Option<&str>, cache: CacheMode) -> Self {
        let file = DiskRequests::new(engine);
        let device = file.device_with(read_only, BlockOptions { id, cache, queues: 1 });
        let ring = Ring::new(&memory(), 0, 64, device.features());
        let mut client = Self { file, device, ring };
        client.ring.start(&mut client.device, None);
        client
    }

    /// Makes a request with `data` to read and `room` to write; returns the status, the length in the used ring
    /// and the room's contents.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32, Vec<u8>) {
        let ram = self.ring.ram.clone();
        ram.write_obj((u128::from(kind) | u128::from(sector) << 64).to_le(), GuestAddress(HEADER)).unwrap();
        ram.write_slice(data, GuestAddress(DATA)).unwrap();
        ram.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let mut chain = vec![readable(HEADER, 16)];
        if !data.is_empty() {
            chain.push(readable(DATA, data.len() as u32));
        }
        if room > 0 {
            ram.write_slice(&vec![0xee; room as usize], GuestAddress(DATA)).unwrap();
            chain.push(writable(DATA, room));
        }
        chain.push(writable(STATUS, 1));
        self.ring.chain(0, &chain, false);
        self.ring.publish(0);
        self.ring.kick();
        let written = self.ring.wait_used(1)[0].1;
        let mut contents = vec![0; room as usize];
        ram.read_slice(&mut contents, GuestAddress(DATA)).unwrap();
        (ram.read_obj(GuestAddress(STATUS)).unwrap(), written, contents)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> u8 {
        self.request(kind, sector, data, room).0
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.file.file.path()).unwrap()
    }

    fn config<const N: usize>(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(offset, &mut bytes[..N]);
        u64::from_le_bytes(bytes)
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn reads_writes_and_their_limits() {
    for engine in BlockEngine::all() {
        let mut client = Client::new(engine, false, None, CacheMode::Writeback);
        let data: Vec<u8> = (0..2048u32).map(|i| (i % 253) as u8).collect();
        assert_eq!(client.request(blk::VIRTIO_BLK_T_OUT, 5, &data, 0), (OK, 1, vec![]));
        assert_eq!(client.contents()[5 * 512..9 * 512], data);
        assert_eq!(client.request(blk::VIRTIO_BLK_T_IN, 5, &[], 2048), (OK, 2049, data.clone()));
        assert_eq!(client.status(blk::VIRTIO_BLK_T_IN, SECTORS - 1, &[], 512), OK);
        for (sector, len) in [(SECTORS, 512), (SECTORS - 1, 1024), (0, 511), (0, 513), (u64::MAX, 512), (1 << 55, 512)]
        {
            let refused = client.request(blk::VIRTIO_BLK_T_IN, sector, &[], len);
            assert_eq!(refused, (IOERR, 0, vec![0xee; len as usize]), "{sector} {len}");
            assert_eq!(client.status(blk::VIRTIO_BLK_T_OUT, sector, &vec![1; len as usize], 0), IOERR);
        }
        assert_eq!(client.status(blk::VIRTIO_BLK_T_FLUSH, 0, &[], 0), OK);
        for unknown in [2, 3, 5, 14, 15, 0x8000_0001, u32::MAX] {
            assert_eq!(client.status(unknown, 0, &[], 512), UNSUPP, "{unknown}");
        }
        assert_eq!(client.contents()[5 * 512..9 * 512], data);
        assert_eq!(client.contents().len() as u64, SECTORS * 512);
    }
}

#[test]
fn headers_and_status_bytes_in_odd_places() {
    for engine in BlockEngine::all() {
        let mut client = Client::new(engine, false, None, CacheMode::Writeback);
        let ram = client.ring.ram.clone();
        client.file.file.as_file().write_all_at(&[0x5a; 512], 0).unwrap();
        // A read whose header is in 16 pieces, and whose status is the last byte of the only writable buffer.
        ram.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
        ram.write_slice(&[0xee; 513], GuestAddress(DATA)).unwrap();
        let mut chain: Vec<_> = (0..16).map(|i| readable(HEADER + i, 1)).collect();
        chain.push(writable(DATA, 513));
        client.ring.chain(0, &chain, false);
        // No status byte; half a header.
        client.ring.chain(20, &[readable(HEADER, 16)], false);
        client.ring.chain(24, &[readable(HEADER, 15), writable(STATUS, 1)], false);
        for head in [0, 20, 24] {
            client.ring.publish(head);
        }
        client.ring.kick();
        let mut used = client.ring.wait_used(3);
        used.sort_unstable();
        assert_eq!(used, [(0, 513), (20, 0), (24, 1)]);
        let mut got = [0; 513];
        ram.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        assert_eq!((&got[..512], got[512]), (&[0x5a; 512][..], OK));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), IOERR);
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for engine in BlockEngine::all() {
        let mut client = Client::new(engine, true, None, CacheMode::Writeback);
        assert_ne!(client.device.features() & 1 << blk::VIRTIO_BLK_F_RO, 0);
        for kind in [blk::VIRTIO_BLK_T_DISCARD, blk::VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(client.status(kind, 0, &range(0, 8, 0), 0), IOERR);
        }
        assert_eq!(client.status(blk::VIRTIO_BLK_T_OUT, 0, &[1; 512], 0), IOERR);
        assert_eq!(client.status(blk::VIRTIO_BLK_T_IN, 0, &[], 512), OK);
        assert!(client.contents().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn an_id_is_given_cut_or_made_up() {
    for engine in BlockEngine::all() {
        for (id, expected) in [(Some("root"), "root\0"), (Some("0123456789012345678901"), "01234567890123456789")] {
            let mut client = Client::new(engine, false, id, CacheMode::Writeback);
            let (status, written, got) = client.request(blk::VIRTIO_BLK_T_GET_ID, 0, &[], 20);
            assert_eq!((status, written), (OK, 21));
            assert!(got.starts_with(expected.as_bytes()));
            assert_eq!(client.request(blk::VIRTIO_BLK_T_GET_ID, 0, &[], 3).2, expected.as_bytes()[..3]);
        }
        let mut client = Client::new(engine, false, None, CacheMode::Writeback);
        let (_, _, got) = client.request(blk::VIRTIO_BLK_T_GET_ID, 0, &[], 24);
        assert!(got[..16].iter().all(u8::is_ascii_hexdigit) && got[16..20] == [0; 4] && got[20..] == [0xee; 4]);
    }
}

#[test]
fn discards_punch_holes_within_their_limits() {
    for engine in BlockEngine::all() {
        let mut client = Client::new(engine, false, None, CacheMode::Writeback);
        client.file.file.as_file().write_all_at(&[0xaa; SECTORS as usize * 512], 0).unwrap();
        let blocks = |client: &Client| client.file.file.as_file().metadata().unwrap().blocks();
        let full = blocks(&client);
        let two = [range(0, 16, 0), range(32, 16, 0)].concat();
        assert_eq!(client.status(blk::VIRTIO_BLK_T_DISCARD, 0, &two, 0), OK);
        assert_eq!(blocks(&client), full - 32);
        let contents = client.contents();
        assert!(contents[..16 * 512].iter().chain(&contents[32 * 512..48 * 512]).all(|&byte| byte == 0));
        assert!(contents[16 * 512..32 * 512].iter().all(|&byte| byte == 0xaa));
        let (most, segments) = (client.config::<4>(36) as u32, client.config::<4>(40) as usize);
        for (ranges, status) in [
            (range(SECTORS - 8, 9, 0), IOERR),
            (range(u64::MAX, 1, 0), IOERR),
            (range(0, 0, 0), IOERR),
            (range(0, most + 1, 0), IOERR),
            (range(64, 1, 1), UNSUPP),
            (range(64, 1, 2), UNSUPP),
            // The first one is good, and is not done because the second one is not.
            ([range(64, 16, 0), range(SECTORS, 1, 0)].concat(), IOERR),
            (vec![0; 15], IOERR),
            (vec![], IOERR),
            (range(64, 1, 0).repeat(segments + 1), IOERR),
        ] {
            assert_eq!(client.status(blk::VIRTIO_BLK_T_DISCARD, 0, &ranges, 0), status, "{ranges:?}");
        }
        assert_eq!(client.contents(), contents);
        assert_eq!(client.status(blk::VIRTIO_BLK_T_DISCARD, 0, &range(64, 1, 0).repeat(segments), 0), OK);
    }
}

#[test]
fn zeroes_are_written_within_their_limits() {
    for engine in BlockEngine::all() {
        let mut client = Client::new(engine, false, None, CacheMode::Unsafe);
        assert_eq!(client.device.features() & 1 << blk::VIRTIO_BLK_F_FLUSH, 0);
        client.file.file.as_file().write_all_at(&[0xaa; SECTORS as usize * 512], 0).unwrap();
        for (sector, flags) in [(1, 0), (64, 1)] {
            assert_eq!(client.status(blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(sector, 32, flags), 0), OK);
        }
        let contents = client.contents();
        for (sector, bytes) in contents.chunks(512).enumerate() {
            let expected = if (1..33).contains(&sector) || (64..96).contains(&sector) { 0 } else { 0xaa };
            assert!(bytes.iter().all(|&byte| byte == expected), "sector {sector}");
        }
        let (most, segments) = (client.config::<4>(48) as u32, client.config::<4>(52) as usize);
        for (ranges, status) in [
            (range(SECTORS, 1, 0), IOERR),
            (range(0, most + 1, 0), IOERR),
            (range(0, 1, 2), UNSUPP),
            (range(40, 1, 0).repeat(segments + 1), IOERR),
        ] {
            assert_eq!(client.status(blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, &ranges, 0), status);
        }
        assert_eq!(client.contents(), contents);
    }
}

#[test]
fn the_configuration_is_what_the_specification_says() {
    for engine in BlockEngine::all() {
        let client = Client::new(engine, false, None, CacheMode::Writeback);
        assert_eq!((client.config::<8>(0), client.config::<4>(12), client.config::<4>(20)), (SECTORS, 254, 512));
        assert_eq!((client.config::<1>(56), client.config::<8>(56)), (1, 1));
        assert_eq!((client.config::<2>(34), client.device.queue_sizes().len()), (0, 1), "without the feature");
        assert_eq!((client.config::<8>(60), client.config::<8>(usize::MAX)), (0, 0));
        let offered = client.device.features();
        for bit in [
            blk::VIRTIO_BLK_F_SEG_MAX,
            blk::VIRTIO_BLK_F_BLK_SIZE,
            blk::VIRTIO_BLK_F_FLUSH,
            blk::VIRTIO_BLK_F_TOPOLOGY,
            blk::VIRTIO_BLK_F_DISCARD,
            blk::VIRTIO_BLK_F_WRITE_ZEROES,
        ] {
            assert_ne!(offered & 1 << bit, 0, "{bit}");
        }
        assert_eq!(offered & feature::RING, feature::RING);
        assert_eq!(offered & (1 << blk::VIRTIO_BLK_F_RO | 1 << blk::VIRTIO_BLK_F_MQ), 0);
    }
}

#[test]
fn each_queue_works_and_stops_by_itself() {
    for engine in BlockEngine::all() {
        const QUEUES: u16 = 4;
        let file = DiskRequests::new(engine);
        let options = BlockOptions { id: None, cache: CacheMode::Writeback, queues: QUEUES };
        let mut device = file.device_with(false, options);
        assert_ne!(device.features() & 1 << blk::VIRTIO_BLK_F_MQ, 0);
        let mut number = [0; 2];
        device.read_config(34, &mut number);
        assert_eq!((u16::from_le_bytes(number), device.queue_sizes().len()), (QUEUES, QUEUES.into()));
        let ram = memory();
        let mut rings: Vec<Ring> = (0..QUEUES).map(|index| Ring::new(&ram, index, 64, device.features())).collect();
        for ring in &rings {
            ring.start(&mut device, None);
        }
        // Each queue has sectors and 64 KiB of its own.
        let write = |ring: &mut Ring, n: u64| {
            let at = HEADER + u64::from(ring.index) * 0x1_0000 + n * 0x800;
            let sector = u128::from(ring.index) * 8 + u128::from(n);
            ram.write_obj((u128::from(blk::VIRTIO_BLK_T_OUT) | sector << 64).to_le(), GuestAddress(at)).unwrap();
            ram.write_slice(&[sector as u8 + 1; 512], GuestAddress(at + 0x200)).unwrap();
            ram.write_obj(0xffu8, GuestAddress(at + 0x400)).unwrap();
            let slot = n as u16 * 3;
            ring.chain(slot, &[readable(at, 16), readable(at + 0x200, 512), writable(at + 0x400, 1)], false);
            ring.publish(slot);
            ring.kick();
        };
        for n in 0..8 {
            for ring in &mut rings {
                write(ring, n);
            }
            if n == 3 {
                rings[1].wait_used(4);
                assert!(device.stop_queue(1).is_some());
            }
        }
        for ring in rings.iter_mut().filter(|ring| ring.index != 1) {
            assert_eq!(ring.wait_used(8).len(), 8);
        }
        assert_eq!(rings[1].used_index(), 4, "a stopped queue");
        for (sector, bytes) in std::fs::read(file.file.path()).unwrap().chunks(512).take(32).enumerate() {
            let expected = if (12..16).contains(&sector) { 0 } else { sector as u8 + 1 };
            assert_eq!(bytes, [expected; 512], "sector {sector}");
        }
    }
}

#[test]
fn a_disk_that_shrank_gives_errors_and_lives() {
    for engine in BlockEngine::all() {
        let mut client = Client::new(engine, false, None, CacheMode::Writeback);
        client.file.file.as_file().set_len(4096).unwrap();
        assert_eq!(client.status(blk::VIRTIO_BLK_T_IN, 16, &[], 512), IOERR);
        assert_eq!(client.status(blk::VIRTIO_BLK_T_IN, 0, &[], 512), OK);
    }
}
