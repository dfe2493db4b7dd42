//! What every device has to do, whatever it does: serve, stop, go on, start anew, and survive its driver.

mod block;
pub mod driver;
mod hanging;
mod limits;
mod net;
mod pairs;
mod random;
mod saving;
pub mod specimens;
mod tray;
mod user;

use std::time::Duration;

use driver::{INDIRECT, NEXT, Ring, WRITE, memory};
use specimens::{Specimen, specimens};

use crate::memory::Ram;
use crate::virtio::{StillBusy, VirtioDevice, feature};

/// Where the buffers of request `n` are.
fn area(n: u32) -> u64 {
    0x10_0000 + u64::from(n % 64) * 0x1000
}

/// A specimen with a running queue of 64 entries.
struct Bench {
    specimen: Box<dyn Specimen>,
    device: Box<dyn VirtioDevice>,
    ring: Ring,
    /// Requests made and answered.
    made: u32,
    answered: u32,
}

impl Bench {
    fn new(specimen: Box<dyn Specimen>, features: u64) -> Self {
        let mut device = specimen.device();
        let features = features & device.features() | feature::VERSION_1;
        let ring = Ring::new(&memory(), specimen.queue(), 64, features);
        ring.start(&mut *device, None);
        Self { specimen, device, ring, made: 0, answered: 0 }
    }

    /// Makes one request of up to eight buffers, in one of eight slots.
    fn make(&mut self, indirect: bool) {
        let buffers = self.specimen.prepare(&self.ring.ram, self.made, area(self.made));
        let slot = (self.made % 8) as u16 * 8;
        self.ring.chain(slot, &buffers, indirect);
        self.ring.publish(slot);
        self.specimen.provoke(self.made);
        self.made += 1;
    }

    /// Waits for the answers to all requests.
    fn settle(&mut self) {
        self.settle_first(self.made - self.answered);
    }

    /// Waits for the answers to the first requests of those that have none yet, and finds no others.
    fn settle_first(&mut self, count: u32) {
        let settled = self.answered + count;
        let used = self.ring.wait_used(count as usize);
        check_answers(&mut *self.specimen, &self.ring.ram, self.answered..settled, &used);
        self.answered = settled;
    }

    /// Starts over, as a driver does after a reset.
    fn reset(&mut self) {
        self.device.stop_queue(self.ring.index);
        self.ring = Ring::new(&self.ring.ram, self.ring.index, self.ring.layout.size, self.ring.features);
        self.ring.start(&mut *self.device, None);
        (self.made, self.answered) = (0, 0);
    }
}

/// Checks that these used entries answer just those requests.
fn check_answers(specimen: &mut dyn Specimen, ram: &Ram, requests: std::ops::Range<u32>, used: &[(u32, u32)]) {
    let mut expected: Vec<u32> = requests.collect();
    for &(head, written) in used {
        let name = specimen.name();
        let at = expected.iter().position(|n| n % 8 * 8 == head);
        let at = at.unwrap_or_else(|| panic!("{name}: {head} answers none of {expected:?}"));
        assert!(at == 0 || !specimen.in_order(), "{name}: request {}", expected[0]);
        let n = expected.remove(at);
        specimen.check(ram, n, area(n), written);
    }
    assert!(expected.is_empty(), "{expected:?} have no answer");
}

/// Each device with and without `EVENT_IDX`, and mergeable buffers where there are some.
fn benches() -> impl Iterator<Item = Bench> {
    [u64::MAX, !feature::EVENT_IDX, !(1 << 15), 0]
        .into_iter()
        .flat_map(|mask| specimens().into_iter().map(move |specimen| Bench::new(specimen, mask)))
}

#[test]
fn every_request_is_answered_once_and_in_order() {
    for mut bench in benches() {
        for round in 0..150 {
            for i in 0..round % 8 + 1 {
                bench.make(i % 2 == 1);
                if round % 3 == 0 {
                    bench.ring.kick();
                }
            }
            bench.ring.kick();
            bench.settle();
        }
        assert_eq!(bench.ring.used_index(), bench.made as u16);
    }
}

#[test]
fn an_idle_device_asks_for_kicks_and_makes_no_interrupts() {
    for mut bench in benches() {
        bench.make(false);
        bench.ring.kick();
        bench.settle();
        let before = bench.ring.events.interrupts(bench.ring.index);
        for _ in 0..3 {
            bench.ring.kick_anyway();
        }
        // A stop comes after the kicks.
        bench.device.stop_queue(bench.ring.index).unwrap();
        assert_eq!(bench.ring.events.interrupts(bench.ring.index), before, "{}", bench.specimen.name());
    }
}

#[test]
fn stopped_in_mid_flight_it_goes_on_where_it_was() {
    for mut bench in benches() {
        for round in 0..50 {
            for i in 0..8 {
                bench.make(i % 2 == 0);
                if round % 2 == 0 {
                    bench.ring.kick();
                }
            }
            bench.ring.kick();
            for _ in 0..round % 3 {
                let state = bench.device.stop_queue(bench.ring.index).unwrap();
                assert_eq!(state.next_used, bench.ring.used_index(), "{}", bench.specimen.name());
                assert_eq!(state.next_avail, state.next_used, "{}: what was taken was used", bench.specimen.name());
                assert_eq!(bench.device.stop_queue(bench.ring.index), None);
                // The guest goes on: its kicks are lost while nobody listens.
                if round % 8 == 1 {
                    bench.ring.kick();
                }
                bench.ring.start(&mut *bench.device, Some(state));
            }
            bench.settle();
        }
    }
}

#[test]
fn a_stop_can_be_taken_back() {
    for mut bench in benches() {
        for round in 0..50 {
            for i in 0..8 {
                bench.make(i % 2 == 0);
            }
            bench.ring.kick();
            for _ in 0..round % 3 {
                match bench.device.stop_queue_within(bench.ring.index, Duration::ZERO) {
                    Ok(state) => bench.ring.start(&mut *bench.device, state),
                    Err(StillBusy) => bench.device.continue_queue(bench.ring.index),
                }
            }
            bench.settle();
        }
        assert!(bench.device.stop_queue(bench.ring.index).is_some(), "it runs");
    }
}

#[test]
fn a_state_moves_to_another_device() {
    for mut bench in benches().filter(|bench| bench.specimen.outlives_the_device()) {
        for _ in 0..8 {
            bench.make(true);
        }
        bench.ring.kick();
        let state = bench.device.stop_queue(bench.ring.index).unwrap();
        // The first one is gone before the second one comes, or a disk would be locked.
        bench.device = Box::new(crate::devices::rng::device("gone".into(), std::sync::Arc::default()).unwrap());
        bench.device = bench.specimen.device();
        // The kicks of before went to the other machine.
        bench.ring.renew_kick();
        bench.ring.start(&mut *bench.device, Some(state));
        bench.settle();
    }
}

#[test]
fn a_reset_starts_anew() {
    for mut bench in benches() {
        // All answered, so that no packet of before is still under way.
        bench.make(false);
        bench.ring.kick();
        bench.settle();
        bench.reset();
        for _ in 0..8 {
            bench.make(false);
        }
        bench.ring.kick();
        bench.settle();
    }
}

#[test]
fn queues_that_cannot_be_started_are_refused() {
    for specimen in specimens() {
        let mut device = specimen.device();
        let name = specimen.name();
        let queues = device.queue_sizes().len() as u16;
        let ring = Ring::new(&memory(), specimen.queue(), 64, feature::RING);
        let mut refused = |index, change: &dyn Fn(&mut crate::virtio::QueueLayout)| {
            let mut resources = ring.resources();
            change(&mut resources.layout);
            assert!(device.start_queue(index, resources, None).is_err(), "{name}: {:?}", ring.layout);
            assert_eq!(device.stop_queue(index), None, "{name}");
        };
        for size in [0, 3, 512, 0x8000, 0xffff] {
            refused(0, &|layout| layout.size = size);
        }
        for addr in [0x1f_fff0, 0x20_0000, 1 << 40, u64::MAX - 15, u64::MAX, 0x1001] {
            refused(0, &|layout| layout.descriptors = addr);
            refused(0, &|layout| layout.avail = addr);
            refused(0, &|layout| layout.used = addr);
        }
        refused(queues, &|_| ());
        refused(u16::MAX, &|_| ());
        ring.start(&mut *device, None);
        assert!(device.start_queue(ring.index, ring.resources(), None).is_err(), "{name}: started twice");
        assert!(device.stop_queue(ring.index).is_some());
    }
}

/// A name, and what is done to a ring's entries 0 to 7 before the chain at 0 is made available.
type Attack = (&'static str, fn(&mut Ring));

const ATTACKS: &[Attack] = &[
    ("a loop of one", |ring| ring.descriptor(0, area(0), 16, NEXT, 0)),
    ("a loop of two", |ring| {
        ring.descriptor(0, area(0), 16, NEXT, 1);
        ring.descriptor(1, area(0), 16, NEXT, 0);
    }),
    ("a next beyond the table", |ring| ring.descriptor(0, area(0), 16, NEXT, 64)),
    ("a next far beyond the table", |ring| ring.descriptor(0, area(0), 16, NEXT | WRITE, 0xffff)),
    ("a buffer after the end of memory", |ring| ring.descriptor(0, 0x20_0000, 16, 0, 0)),
    ("a buffer over the end of memory", |ring| ring.descriptor(0, 0x1f_fff8, 16, WRITE, 0)),
    ("a buffer longer than memory", |ring| ring.descriptor(0, 0, u32::MAX, WRITE, 0)),
    ("a buffer that wraps", |ring| ring.descriptor(0, u64::MAX - 7, 16, WRITE, 0)),
    ("a readable buffer after a writable one", |ring| {
        ring.descriptor(0, area(0), 16, WRITE | NEXT, 1);
        ring.descriptor(1, area(0), 16, 0, 0);
    }),
    ("an indirect table in an indirect table", |ring| {
        ring.descriptor(0, ring.table(0), 16, INDIRECT, 0);
        ring.write_descriptor(ring.table(0), ring.table(1), 16, INDIRECT, 0);
        ring.write_descriptor(ring.table(1), area(0), 16, 0, 0);
    }),
    ("an indirect table that contains itself", |ring| {
        ring.descriptor(0, ring.table(0), 16, INDIRECT, 0);
        ring.write_descriptor(ring.table(0), ring.table(0), 16, INDIRECT, 0);
    }),
    ("an indirect table of no entries", |ring| ring.descriptor(0, ring.table(0), 0, INDIRECT, 0)),
    ("an indirect table of one and a half entries", |ring| {
        ring.descriptor(0, ring.table(0), 24, INDIRECT, 0);
        ring.write_descriptor(ring.table(0), area(0), 16, WRITE, 0);
    }),
    ("an indirect table beyond memory", |ring| ring.descriptor(0, 0x20_0000, 16, INDIRECT, 0)),
    ("an indirect table that wraps", |ring| ring.descriptor(0, u64::MAX - 15, 32, INDIRECT, 0)),
    ("an indirect table of 64 Ki entries", |ring| ring.descriptor(0, 0, 16 << 16, INDIRECT, 0)),
    ("an indirect chain longer than the queue", |ring| {
        for i in 0..65 {
            ring.write_descriptor(ring.table(0) + 16 * i, area(0), 1, NEXT | WRITE, i as u16 + 1);
        }
        ring.write_descriptor(ring.table(0) + 16 * 65, area(0), 1, WRITE, 0);
        ring.descriptor(0, ring.table(0), 16 * 66, INDIRECT, 0);
    }),
    ("an indirect loop", |ring| {
        ring.descriptor(0, ring.table(0), 32, INDIRECT, 0);
        ring.write_descriptor(ring.table(0), area(0), 16, NEXT | WRITE, 1);
        ring.write_descriptor(ring.table(0) + 16, area(0), 16, NEXT | WRITE, 0);
    }),
    ("an index that jumps", |ring| ring.jump(64)),
    ("an index that jumps back", |ring| ring.jump(0xfffe)),
];

#[test]
fn a_broken_ring_is_reported_and_left_alone() {
    for features in [u64::MAX, 0] {
        for specimen in specimens() {
            let mut bench = Bench::new(specimen, features);
            for (attack, set_up) in ATTACKS {
                let name = format!("{}: {attack}", bench.specimen.name());
                bench.make(false);
                bench.ring.kick();
                bench.settle();
                set_up(&mut bench.ring);
                bench.ring.publish(0);
                bench.ring.kick_anyway();
                assert!(bench.ring.events.wait(|_, broken| broken.is_some()), "{name}");
                let used = bench.ring.used_index();
                bench.ring.chain(8, &[driver::writable(area(0), 2048)], false);
                bench.ring.publish(8);
                bench.ring.kick_anyway();
                bench.device.stop_queue(bench.ring.index).unwrap();
                assert_eq!(bench.ring.used_index(), used, "{name}: silent until it is reset");
                bench.reset();
            }
            bench.make(true);
            bench.ring.kick();
            bench.settle();
        }
    }
}

#[test]
fn chains_without_a_byte_do_no_harm() {
    for mut bench in benches() {
        bench.ring.descriptor(60, area(0), 0, 0, 0);
        bench.ring.descriptor(61, u64::MAX, 0, WRITE, 0);
        for head in [60, 61] {
            bench.ring.publish(head);
        }
        bench.ring.kick();
        // A receiver keeps them for later; everyone else gives them back.
        if bench.specimen.name().starts_with("net, receiving") {
            bench.device.stop_queue(0).unwrap();
        } else {
            assert_eq!(bench.ring.wait_used(2), [(60, 0), (61, 0)], "{}", bench.specimen.name());
        }
        assert_eq!(bench.ring.events.broken(), None);
        bench.reset();
        bench.make(false);
        bench.ring.kick();
        bench.settle();
    }
}

#[test]
fn a_dropped_device_ends_its_thread() {
    for specimen in specimens() {
        let mut bench = Bench::new(specimen, u64::MAX);
        bench.make(false);
        bench.ring.kick();
        drop(bench.device);
        // Nobody holds guest memory any more but the ring itself.
        assert_eq!(std::sync::Arc::strong_count(&bench.ring.ram), 1, "{}", bench.specimen.name());
    }
}
