//! Devices over their limits: what has to wait stays in the ring, and nobody waits for that who wants it stopped.

use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::driver::{Ring, memory, readable, writable};
use super::specimens::{BlockEngine, DiskRequests, Specimen, limited};
use super::{Bench, area};
use crate::backend::Limiter;
use crate::backend::limiter::Wait;
use crate::config::{CacheMode, RateLimits, TokenBucket};
use crate::devices::block::BlockOptions;
use crate::devices::worker::{Served, Turn};
use crate::virtio::{Chain, VirtioDevice, Virtqueue, feature};

/// Longer than any test.
const HOUR: Duration = Duration::from_secs(3600);

const NO_LIMIT: Option<TokenBucket> = Some(TokenBucket { size: 0, refill_ms: 0, burst: 0 });
const UNLIMITED: RateLimits = RateLimits { bandwidth: NO_LIMIT, operations: NO_LIMIT };

/// So many at once, and as many again after so many hours.
fn hourly(size: u64) -> Option<TokenBucket> {
    Some(TokenBucket { size, refill_ms: size * HOUR.as_millis() as u64, burst: 0 })
}

fn operations(size: u64) -> RateLimits {
    RateLimits { bandwidth: None, operations: hourly(size) }
}

fn limiter(specimen: &dyn Specimen) -> &Limiter {
    specimen.limiter().expect("it can be limited")
}

/// Each device that can have limits, and has none yet.
fn benches() -> impl Iterator<Item = Bench> {
    [u64::MAX, 0]
        .into_iter()
        .flat_map(|features| limited(UNLIMITED).into_iter().map(move |specimen| Bench::new(specimen, features)))
}

fn make_eight(bench: &mut Bench) {
    for i in 0..8 {
        bench.make(i % 2 == 0);
    }
    bench.ring.kick();
}

#[test]
fn limits_come_change_and_go_while_it_runs() {
    for mut bench in benches() {
        make_eight(&mut bench);
        bench.settle();
        limiter(&*bench.specimen).update(operations(3));
        make_eight(&mut bench);
        bench.settle_first(3);
        // Time brings one, a new limit two, and none at all the rest.
        limiter(&*bench.specimen).skip(HOUR);
        bench.settle_first(1);
        limiter(&*bench.specimen).update(operations(2));
        bench.settle_first(2);
        limiter(&*bench.specimen).update(UNLIMITED);
        bench.settle();
        make_eight(&mut bench);
        bench.settle();
    }
}

#[test]
fn a_stop_does_not_wait_for_the_limits() {
    for mut bench in benches() {
        limiter(&*bench.specimen).update(operations(3));
        make_eight(&mut bench);
        bench.settle_first(3);
        for _ in 0..3 {
            let state = bench.device.stop_queue(bench.ring.index).unwrap();
            assert_eq!((state.next_used, state.next_avail), (3, 3), "{}", bench.specimen.name());
            bench.ring.start(&mut *bench.device, Some(state));
        }
        limiter(&*bench.specimen).update(UNLIMITED);
        bench.settle();
        limiter(&*bench.specimen).update(operations(1));
        make_eight(&mut bench);
        bench.settle_first(1);
        drop(bench.device);
        assert_eq!(std::sync::Arc::strong_count(&bench.ring.ram), 1, "{}", bench.specimen.name());
    }
}

#[test]
fn bytes_are_counted_and_no_others() {
    for mut bench in benches() {
        limiter(&*bench.specimen).update(RateLimits { bandwidth: hourly(1), operations: None });
        for _ in 0..2 {
            let bytes = bench.specimen.bytes(bench.made) as u32;
            make_eight(&mut bench);
            bench.settle_first(1);
            // An hour a byte, less what has gone by since.
            let Err(Wait(debt)) = limiter(&*bench.specimen).check() else { panic!("it has no debt") };
            let name = bench.specimen.name();
            assert!(debt <= HOUR * bytes && debt > HOUR * (bytes - 1), "{name}: {debt:?} for {bytes}");
            limiter(&*bench.specimen).update(UNLIMITED);
            bench.settle();
            limiter(&*bench.specimen).update(RateLimits { bandwidth: hourly(1), operations: None });
        }
    }
}

#[test]
fn the_second_request_waits_until_it_may() {
    for mut specimen in limited(operations(1)) {
        let mut ring = Ring::new(&memory(), specimen.queue(), 64, feature::VERSION_1);
        for n in 0..2 {
            let buffers = specimen.prepare(&ring.ram, n, area(n));
            ring.chain(n as u16 * 8, &buffers, false);
            ring.publish(n as u16 * 8);
            specimen.provoke(n);
        }
        let mut engine = specimen.engine();
        let mut queue = Virtqueue::new(ring.index, 256, &ring.resources(), None).unwrap();
        let mut chain = Chain::new(&ring.ram);
        let mut serve = |queue: &mut Virtqueue| {
            engine.start(ring.index, ring.features, &ring.ram).unwrap();
            let served = engine.serve(queue, &mut chain, &mut Turn::of(16)).unwrap();
            // What is in flight comes back.
            engine.stop(queue);
            (served, queue.state().next_avail)
        };
        for _ in 0..3 {
            let (served, taken) = serve(&mut queue);
            let Served::Throttled(Wait(time)) = served else { panic!("{}: {served:?}", specimen.name()) };
            assert!(time <= HOUR && time > HOUR / 2, "{time:?}");
            assert_eq!((taken, ring.used_index()), (1, 1), "{}", specimen.name());
        }
        limiter(&*specimen).skip(HOUR);
        let (served, taken) = serve(&mut queue);
        assert!(!matches!(served, Served::Throttled(_)), "{}", specimen.name());
        assert_eq!((taken, ring.used_index()), (2, 2), "{}", specimen.name());
        let heads: Vec<u32> = ring.collect().into_iter().map(|(head, _)| head).collect();
        assert_eq!(heads, [0, 8], "{}", specimen.name());
    }
}

#[test]
fn all_queues_of_a_disk_share_its_limits() {
    for engine in BlockEngine::all() {
        let disk = DiskRequests::new(engine);
        disk.limiter.update(operations(2));
        let mut device = disk.device_with(false, BlockOptions { id: None, cache: CacheMode::Writeback, queues: 2 });
        let ram = memory();
        let mut rings = [0, 1].map(|index| Ring::new(&ram, index, 64, device.features()));
        // Flushes: an operation without data.
        ram.write_obj(4u128.to_le(), GuestAddress(area(0))).unwrap();
        let flush = |ring: &mut Ring, slot: u16| {
            ring.chain(slot, &[readable(area(0), 16), writable(area(1) + u64::from(slot), 1)], false);
            ring.publish(slot);
            ring.kick();
        };
        for ring in &mut rings {
            ring.start(&mut device, None);
        }
        let [first, second] = &mut rings;
        for slot in [0, 8, 16] {
            flush(first, slot);
        }
        assert_eq!(first.wait_used(2).len(), 2);
        flush(second, 24);
        let state = device.stop_queue(0).unwrap();
        disk.limiter.update(operations(1));
        assert_eq!(second.wait_used(1).len(), 1);
        first.start(&mut device, Some(state));
        flush(second, 32);
        assert_eq!([0, 1].map(|index| device.stop_queue(index).unwrap().next_used), [2, 1]);
    }
}
