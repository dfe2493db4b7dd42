//! A card of several pairs on a real tap, and its control queue.

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net as net;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Ring, memory, readable, writable};
use super::net::{ip, own_network};
use crate::backend::{OpenDirectly, Tap, TapError, VhostNet};
use crate::devices::Front;
use crate::devices::net::{NetLimiters, NetOptions, device, saved_shape};
use crate::memory::Ram;
use crate::virtio::{VirtioDevice, feature};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const MQ: u64 = 1 << net::VIRTIO_NET_F_MQ;
const DATA: u64 = 0x10_0000;
/// Where commands are.
const COMMAND: u64 = 0x1f_0000;

/// A card on two queues of a tap, in a network of this thread's own.
struct Card {
    front: Front,
    ram: Ram,
}

impl Card {
    fn new(what: &str, vhost: bool) -> Option<Self> {
        if !own_network(what) {
            return None;
        }
        ip("tuntap add dev tap0 mode tap multi_queue");
        ip("link set dev tap0 up");
        ip("addr add 10.0.0.1/24 dev tap0");
        ip("neigh add 10.0.0.2 lladdr 02:00:00:00:00:07 dev tap0 nud permanent");
        if vhost && let Err(error) = VhostNet::open(&OpenDirectly) {
            eprintln!("*** NOT TESTED: {what}: {error}");
            return None;
        }
        let options = NetOptions { mac: Some(crate::config::MacAddress(MAC)), mtu: None, shape: None };
        Some(Self { front: Self::front(vhost, options), ram: memory() })
    }

    fn front(vhost: bool, options: NetOptions) -> Front {
        let vhosts = (0..if vhost { 2 } else { 0 }).map(|_| VhostNet::open(&OpenDirectly).unwrap()).collect();
        let taps = Tap::attach(&OpenDirectly, "tap0", 2).unwrap();
        device("net0".into(), taps, vhosts, options, NetLimiters::default()).unwrap()
    }

    /// Another card in place of this one, which goes on as it was saved; its queues are stopped.
    fn again(self, vhost: bool, features: u64) -> Self {
        let own = self.front.save();
        drop(self.front);
        let shape = Some(saved_shape(&own).unwrap());
        let mut front = Self::front(vhost, NetOptions { shape, ..NetOptions::default() });
        front.check(&own, features).unwrap();
        assert!(!front.restore(&own).unwrap(), "its configuration is the same");
        assert_eq!(front.save(), own);
        Self { front, ..self }
    }

    fn ring(&mut self, index: u16, features: u64) -> Ring {
        let ring = Ring::new(&self.ram, index, 64, self.front.features() & features);
        ring.start(&mut self.front, None);
        ring
    }

    /// A receiver with 64 buffers.
    fn receiver(&mut self, pair: u16, features: u64) -> Ring {
        let mut ring = self.ring(2 * pair, features);
        for i in 0..64 {
            let at = DATA + (u64::from(pair) * 64 + u64::from(i)) * 2048;
            ring.chain(i, &[writable(at, 2048)], false);
            ring.publish(i);
        }
        ring.kick();
        ring
    }

    fn mac(&self) -> [u8; 6] {
        let mut mac = [0; 6];
        self.front.read_config(0, &mut mac);
        mac
    }
}

/// What the device answers to a command.
fn command(control: &mut Ring, bytes: &[u8]) -> u8 {
    control.ram.write_slice(bytes, GuestAddress(COMMAND)).unwrap();
    control.ram.write_obj(0xeeu8, GuestAddress(COMMAND + 64)).unwrap();
    let data = readable(COMMAND + 2, bytes.len() as u32 - 2);
    control.chain(0, &[readable(COMMAND, 2), data, writable(COMMAND + 64, 1)], false);
    control.publish(0);
    control.kick();
    assert_eq!(control.wait_used(1), [(0, 1)]);
    control.ram.read_obj(GuestAddress(COMMAND + 64)).unwrap()
}

const FLOWS: usize = 32;

/// Sends a datagram from each of as many ports, and counts those that each receiver gets, with the flags of the last.
fn spread(receivers: &mut [&mut Ring]) -> (Vec<usize>, u8) {
    // An interface that has just got its first reader sends nothing before the kernel comes round to it.
    let up = || Command::new("ip").args(["-o", "link", "show", "tap0"]).output().unwrap().stdout;
    let waiting = Instant::now();
    while !String::from_utf8_lossy(&up()).contains("state UP") {
        assert!(waiting.elapsed() < Duration::from_secs(10), "tap0 does not come up");
    }
    for _ in 0..FLOWS {
        UdpSocket::bind("10.0.0.1:0").unwrap().send_to(b"are you there", "10.0.0.2:7").unwrap();
    }
    let mut counts = vec![0; receivers.len()];
    let mut flags = 0xff;
    let start = Instant::now();
    while counts.iter().sum::<usize>() < FLOWS {
        assert!(start.elapsed() < Duration::from_secs(10), "{counts:?} of {FLOWS} frames have come");
        for (count, ring) in counts.iter_mut().zip(&mut *receivers) {
            for (head, len) in ring.collect() {
                let at = DATA + (u64::from(ring.index / 2) * 64 + u64::from(head)) * 2048;
                let mut packet = vec![0; len as usize];
                ring.ram.read_slice(&mut packet, GuestAddress(at)).unwrap();
                ring.publish(head as u16);
                ring.kick();
                if packet.ends_with(b"are you there") {
                    *count += 1;
                    flags = packet[0];
                }
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    (counts, flags)
}

/// The first pair alone, then both, then the first again after a reset.
fn pairs_come_and_go(mut card: Card) {
    let mut config = [0; 12];
    card.front.read_config(0, &mut config);
    assert_eq!(config[8], 2, "pairs");
    assert_eq!(card.front.queue_sizes(), [256, 256, 256, 256, 64]);
    for round in 0..2 {
        let mut receivers = [card.receiver(0, u64::MAX), card.receiver(1, u64::MAX)];
        let mut control = card.ring(4, u64::MAX);
        let [first, second] = &mut receivers;
        assert_eq!(spread(&mut [first, second]).0, [FLOWS, 0], "round {round}");
        assert_eq!(command(&mut control, &[4, 0, 2, 0]), 0);
        let (counts, flags) = spread(&mut [first, second]);
        assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
        assert_eq!(flags & 1, 1, "checksums are left to us");
        // Until we say that we do not do it any more.
        assert_eq!(command(&mut control, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
        assert_eq!(spread(&mut [first, second]).1 & 1, 0);
        // Paused and resumed, everything is as it was.
        let state = card.front.stop_queue(0).unwrap();
        assert_eq!(state.next_used, first.used_index());
        first.start(&mut card.front, Some(state));
        assert_eq!(spread(&mut [first, second]).1 & 1, 0);
        // As many as there are, and one at least.
        for count in [0, 3, 0x80] {
            assert_eq!(command(&mut control, &[4, 0, count, 0]), 1);
        }
        assert_eq!(command(&mut control, &[1, 1, 0x0a, 1, 2, 3, 4, 5]), 0);
        assert_eq!(card.mac(), [0x0a, 1, 2, 3, 4, 5]);
        for index in [0, 2, 4] {
            card.front.stop_queue(index).unwrap();
        }
        card.front.reset();
        assert_eq!(card.mac(), MAC);
    }
}

#[test]
fn pairs_come_and_go_with_threads() {
    if let Some(card) = Card::new("a card of two pairs", false) {
        pairs_come_and_go(card);
    }
}

#[test]
fn pairs_come_and_go_with_vhost() {
    if let Some(card) = Card::new("vhost-net", true) {
        pairs_come_and_go(card);
    }
}

/// Both pairs in use, a changed address, no offloads: so it is after each move, whoever moves the frames then.
fn pairs_stay_what_they_are(what: &str, hosts: &[bool]) {
    let Some(mut card) = Card::new(what, hosts[0]) else { return };
    let features = card.front.features();
    let mut receivers = [card.receiver(0, u64::MAX), card.receiver(1, u64::MAX)];
    let mut control = card.ring(4, u64::MAX);
    for bytes in [&[4u8, 0, 2, 0][..], &[1, 1, 2, 9, 9, 9, 9, 9], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        assert_eq!(command(&mut control, bytes), 0);
    }
    for &vhost in hosts {
        let states = [0, 2, 4].map(|index| card.front.stop_queue(index).unwrap());
        let used = receivers.each_ref().map(Ring::used_index);
        assert_eq!([states[0].next_used, states[1].next_used], used);
        card = card.again(vhost, features);
        assert_eq!(card.mac(), [2, 9, 9, 9, 9, 9]);
        for (ring, state) in receivers.iter().chain([&control]).zip(states) {
            ring.start(&mut card.front, Some(state));
        }
        let [first, second] = &mut receivers;
        let (counts, flags) = spread(&mut [first, second]);
        assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
        assert_eq!(flags & 1, 0, "no offloads");
        assert_eq!(command(&mut control, &[200, 0, 0, 0]), 1);
    }
    // A driver that resets it finds it as it was at first.
    for index in [0, 2, 4] {
        card.front.stop_queue(index).unwrap();
    }
    card.front.reset();
    assert_eq!(card.mac(), MAC);
}

#[test]
fn pairs_stay_what_they_are_with_threads() {
    pairs_stay_what_they_are("moves of a card of two pairs", &[false, false]);
}

#[test]
fn pairs_stay_what_they_are_with_vhost() {
    pairs_stay_what_they_are("moves of a card with vhost", &[true, true, false, true]);
}

#[test]
fn each_rule_of_a_cards_state_has_its_error() {
    let Some(card) = Card::new("the state of a card", false) else { return };
    let own = card.front.save();
    let refused = |field: &str, value: serde_json::Value, features| {
        let mut changed = own.clone();
        *changed.state.pointer_mut(field).unwrap() = value;
        card.front.check(&changed, features).map_err(|error| error.to_string())
    };
    let csum = 1u64 << net::VIRTIO_NET_F_GUEST_CSUM;
    for (field, value, features, expected) in [
        ("/active_pairs", 2.into(), 0, Ok(())),
        ("/active_pairs", 3.into(), 0, Err("state.active_pairs: 3 of 2")),
        ("/active_pairs", 0.into(), 0, Err("state.active_pairs: 0 of 2")),
        ("/mac/0", 3.into(), 0, Err("state.mac: [3, 0, 0, 0, 0, 7] is not one station's")),
        ("/chosen_offloads", csum.into(), csum, Ok(())),
        (
            "/chosen_offloads",
            csum.into(),
            0,
            Err("state.chosen_offloads: 0x2 are not all among those that were negotiated"),
        ),
        (
            "/chosen_offloads",
            MQ.into(),
            MQ,
            Err("state.chosen_offloads: 0x400000 are not all among those that were negotiated"),
        ),
    ] {
        assert_eq!(refused(field, value, features), expected.map_err(str::to_owned), "{field}");
    }
    assert!(refused("/shape/mtu", 1400.into(), 0).unwrap_err().starts_with("state.shape: the card is "));
}

#[test]
fn a_driver_that_knows_of_one_pair_finds_the_control_queue_after_it() {
    for vhost in [false, true] {
        let Some(mut card) = Card::new("a card of two pairs, one of them known", vhost) else { return };
        for _ in 0..2 {
            let mut first = card.receiver(0, !MQ);
            let mut control = card.ring(2, !MQ);
            assert_eq!(command(&mut control, &[1, 1, 2, 9, 9, 9, 9, 9]), 0);
            assert_eq!(card.mac(), [2, 9, 9, 9, 9, 9]);
            assert_eq!(command(&mut control, &[4, 0, 1, 0]), 1, "it does not know of pairs");
            assert_eq!(spread(&mut [&mut first]).0, [FLOWS]);
            for index in [3, 4, 5] {
                let beyond = Ring::new(&card.ram, index, 64, feature::RING);
                assert!(card.front.start_queue(index, beyond.resources(), None).is_err(), "queue {index}");
                assert_eq!(card.front.stop_queue(index), None);
            }
            for index in [0, 2] {
                assert!(card.front.stop_queue(index).is_some());
            }
            card.front.reset();
        }
    }
}

#[test]
fn vhost_reports_a_broken_ring_and_leaves_it_alone() {
    let Some(mut card) = Card::new("vhost-net's broken rings", true) else { return };
    let mut control = card.ring(4, u64::MAX);
    for round in 0..3 {
        let (mut tx, mut rx) = (card.ring(1, u64::MAX), card.receiver(0, u64::MAX));
        match round {
            0 => tx.descriptor(0, 0x20_0000, 100, 0, 0),
            1 => tx.descriptor(0, DATA, 100, super::driver::NEXT, 0xffff),
            _ => tx.jump(1000),
        }
        tx.publish(0);
        tx.kick_anyway();
        assert!(tx.events.wait(|_, broken| broken.is_some()), "round {round}");
        tx.chain(8, &[readable(DATA, 100)], false);
        tx.publish(8);
        tx.kick_anyway();
        // The other way goes on.
        assert_eq!(spread(&mut [&mut rx]).0, [FLOWS]);
        assert_eq!(rx.events.broken(), None);
        card.front.stop_queue(1).unwrap();
        assert_eq!(tx.used_index(), 0, "silent until it is reset");
        card.front.stop_queue(0).unwrap();
    }
    assert_eq!(command(&mut control, &[1, 1, 2, 9, 9, 9, 9, 9]), 0);
}

#[test]
fn a_tap_of_one_queue_has_not_several() {
    if !own_network("taps of one queue and several") {
        return;
    }
    ip("tuntap add dev tap0 mode tap");
    let error = Tap::attach(&OpenDirectly, "tap0", 2).unwrap_err();
    assert!(matches!(error, TapError::OneQueue(_)), "{error:?}");
    assert!(error.hint().unwrap().contains("ip tuntap add dev tap0 mode tap multi_queue"));
    assert!(matches!(Tap::attach(&OpenDirectly, "lo", 2), Err(TapError::NotATap(_))));
    ip("tuntap add dev tap1 mode tap multi_queue");
    let taps = Tap::attach(&OpenDirectly, "tap1", 16).unwrap();
    let offloads = taps[0].offloads();
    drop(Tap::attach(&OpenDirectly, "tap0", 1).unwrap());
    let card = device("net0".into(), taps, Vec::new(), NetOptions::default(), NetLimiters::default()).unwrap();
    assert_eq!(card.queue_sizes().len(), 33);
    let has = |bit: u32| card.features() & 1 << bit != 0;
    assert!(has(net::VIRTIO_NET_F_MQ) && has(net::VIRTIO_NET_F_CTRL_VQ));
    for bit in [net::VIRTIO_NET_F_HOST_USO, net::VIRTIO_NET_F_GUEST_USO4, net::VIRTIO_NET_F_GUEST_USO6] {
        assert_eq!(has(bit), offloads.uso);
    }
}
