//! Rings of random contents: no device may panic, hang, or write where it was not told to.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{INDIRECT, Ring, WRITE};
use super::specimens::specimens;
use crate::backend::limiter::Wait;
use crate::devices::worker::{Served, Turn};
use crate::memory::anonymous;
use crate::virtio::{Chain, Virtqueue, feature};

/// Rings 0 to 2, and buffers behind them.
const MEMORY: u64 = 0x5_0000;
const BUFFERS: u64 = 0x3_0000;
const SIZE: u16 = 16;

#[derive(Debug, Clone, Copy)]
struct Entry {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Descriptors that are mostly sensible one by one, with addresses mostly from `addresses`.
fn entry(addresses: std::ops::Range<u64>) -> impl Strategy<Value = Entry> {
    let addr = prop_oneof![20 => addresses, 1 => MEMORY - 64..MEMORY + 64, 1 => any::<u64>()];
    let len = prop_oneof![
        6 => (0u32..16).prop_map(|n| n * 16),
        6 => (0u32..5).prop_map(|n| n * 512),
        6 => 0u32..4096,
        1 => Just(0),
        1 => any::<u32>()
    ];
    let flags = prop_oneof![8 => 0u16..4, 1 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![10 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Entry { addr, len, flags, next })
}

#[derive(Debug, Clone)]
struct Case {
    direct: Vec<Entry>,
    indirect: Vec<Entry>,
    heads: Vec<u16>,
    jump: u16,
    features: u64,
}

fn case(addresses: std::ops::Range<u64>) -> impl Strategy<Value = Case> {
    (
        proptest::collection::vec(entry(addresses.clone()), SIZE as usize),
        proptest::collection::vec(entry(addresses), 64),
        proptest::collection::vec(prop_oneof![20 => 0..SIZE, 1 => any::<u16>()], 1..=SIZE as usize),
        prop_oneof![20 => Just(0u16), 1 => any::<u16>()],
        any::<u64>(),
    )
        .prop_map(|(direct, indirect, heads, jump, features)| Case { direct, indirect, heads, jump, features })
}

/// Serves the case on every device; `check` sees memory before and after.
fn serve(case: &Case, check: impl Fn(&[u8], &[u8])) {
    for mut specimen in specimens() {
        let ram = anonymous(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut ring = Ring::new(&ram, specimen.queue(), SIZE, case.features | feature::VERSION_1);
        // Wherever a block request's header points, it is a plausible one: sectors near the end of the disk.
        for (i, at) in (BUFFERS..MEMORY).step_by(16).enumerate() {
            let kind = [0u128, 1, 4, 8, 11, 13, 99][i % 7];
            ram.write_obj(kind | (i as u128 % 140) << 64, GuestAddress(at)).unwrap();
        }
        // Indirect entries lie behind tables 0 to 3; entries that mean to be indirect are sent there.
        for (i, e) in (0u16..).zip(&case.indirect) {
            ring.write_descriptor(ring.table(i / 16) + 16 * u64::from(i % 16), e.addr, e.len, e.flags, e.next);
        }
        for (i, e) in (0u16..).zip(&case.direct) {
            let addr = if e.flags == INDIRECT { ring.table(i % 4) } else { e.addr };
            ring.descriptor(i, addr, e.len, e.flags, e.next);
        }
        for &head in &case.heads {
            ring.publish(head);
        }
        ring.jump(case.jump);
        specimen.provoke(0);
        let snapshot = || {
            let mut bytes = vec![0; MEMORY as usize];
            ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        let before = snapshot();
        let mut engine = specimen.engine();
        let mut queue = Virtqueue::new(ring.index, 256, &ring.resources(), None).unwrap();
        let mut chain = Chain::new(&ram);
        engine.start(ring.index, ring.features, &ram).unwrap_or_default();
        let mut turns = 0;
        loop {
            match engine.serve(&mut queue, &mut chain, &mut Turn::of(16)) {
                Ok(Served::TurnOver) => {}
                Ok(Served::Throttled(Wait(time))) => specimen.limiter().expect("it is limited").skip(time),
                Ok(Served::NoBuffers | Served::NoWork) | Err(_) => break,
            }
            turns += 1;
            assert!(turns < 500, "{} does not end", specimen.name());
        }
        engine.stop(&mut queue);
        check(&before, &snapshot());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn only_writable_buffers_are_written(case in case(BUFFERS..MEMORY)) {
        let mut allowed = vec![false; MEMORY as usize];
        for e in case.direct.iter().chain(&case.indirect).filter(|e| e.flags & WRITE != 0) {
            for byte in e.addr..e.addr.saturating_add(e.len.into()).min(MEMORY) {
                allowed[byte as usize] = true;
            }
        }
        serve(&case, |before, after| {
            for at in BUFFERS as usize..MEMORY as usize {
                assert!(allowed[at] || before[at] == after[at], "{at:#x} was written");
            }
        });
    }

    /// Buffers may cover the rings themselves, which then change under the device's hands.
    #[test]
    fn rings_that_overwrite_themselves_end(case in case(0..MEMORY)) {
        serve(&case, |_, _| ());
    }
}
