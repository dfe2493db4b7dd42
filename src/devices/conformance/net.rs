//! What is particular to packets: many buffers for one, none for many, and garbage.

use std::time::Duration;

use virtio_bindings::virtio_net as net;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Buffer, NEXT, Ring, WRITE, memory, readable, writable};
use super::specimens::Packets;
use crate::virtio::{VirtioDevice, feature};

const DATA: u64 = 0x10_0000;

struct Bench {
    packets: Packets,
    device: Box<dyn VirtioDevice>,
    rx: Ring,
    tx: Ring,
}

impl Bench {
    fn new(features: u64) -> Self {
        Self::over(Packets::new(), features)
    }

    fn over(packets: Packets, features: u64) -> Self {
        let mut device = packets.device();
        let ram = memory();
        let features = device.features() & features | feature::VERSION_1;
        let (rx, tx) = (Ring::new(&ram, 0, 64, features), Ring::new(&ram, 1, 64, features));
        rx.start(&mut *device, None);
        tx.start(&mut *device, None);
        Self { packets, device, rx, tx }
    }

    /// Makes `count` receive buffers of `len` bytes available.
    fn post(&mut self, count: u16, len: u32) {
        for i in 0..count {
            self.rx.chain(i, &[writable(DATA + u64::from(i) * u64::from(len), len)], false);
            self.rx.publish(i);
        }
        self.rx.kick();
    }

    fn send(&mut self, chain: &[Buffer]) {
        self.tx.chain(0, chain, false);
        self.tx.publish(0);
        self.tx.kick();
        assert_eq!(self.tx.wait_used(1), [(0, 0)]);
    }
}

#[test]
fn a_packet_over_many_buffers_arrives_whole_and_at_once() {
    let mut bench = Bench::over(Packets::with("net0", 16_000), u64::MAX);
    bench.post(64, 1000);
    for n in 0..3 {
        bench.packets.put(&Packets::packet(n, 12_345));
        let used = bench.rx.wait_used(1);
        let lens: Vec<u32> = used.iter().map(|&(_, len)| len).collect();
        assert_eq!(lens, [&[1000; 12][..], &[357]].concat());
        let mut got = Vec::new();
        for (head, len) in used {
            let mut part = vec![0; len as usize];
            bench.rx.ram.read_slice(&mut part, GuestAddress(DATA + u64::from(head) * 1000)).unwrap();
            got.extend(part);
        }
        let mut expected = Packets::packet(n, 12_345);
        expected[10] = 13;
        assert_eq!(got, expected);
    }
}

#[test]
fn packets_wait_for_buffers() {
    for (name, features) in [("net-wait1", u64::MAX), ("net-wait2", !(1 << net::VIRTIO_NET_F_MRG_RXBUF))] {
        let mut bench = Bench::over(Packets::with(name, 1500), features);
        for n in 0..5 {
            bench.packets.put(&Packets::packet(n, 100));
        }
        // The thread sleeps meanwhile.
        let ran = thread_time(name);
        std::thread::sleep(Duration::from_millis(50));
        assert!(thread_time(name) - ran < Duration::from_millis(25), "it spins");
        bench.post(8, 2048);
        assert_eq!(bench.rx.wait_used(5), [(0, 112), (1, 112), (2, 112), (3, 112), (4, 112)]);
        let state = bench.device.stop_queue(0).unwrap();
        assert_eq!((state.next_avail, state.next_used), (5, 5));
    }
}

/// The time that this process's threads of a name have run.
fn thread_time(name: &str) -> Duration {
    let mut total = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let read = |file| std::fs::read_to_string(task.as_ref().unwrap().path().join(file)).unwrap_or_default();
        if read("comm").trim() == name {
            total += read("schedstat").split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0u64);
        }
    }
    Duration::from_nanos(total)
}

#[test]
fn a_packet_that_does_not_fit_is_dropped_alone() {
    // One buffer for each packet, and all buffers for one packet.
    for (features, len) in [(0, 500), (1 << net::VIRTIO_NET_F_MRG_RXBUF, 8)] {
        let mut bench = Bench::new(features);
        bench.post(64, len);
        bench.packets.put(&Packets::packet(1, 2000));
        bench.packets.put(&Packets::packet(2, 20));
        let used = bench.rx.wait_used(1);
        assert_eq!(used.iter().map(|&(_, len)| len).sum::<u32>(), 32);
        let mut got = [0; 32];
        bench.rx.ram.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        let mut expected = Packets::packet(2, 20);
        expected[10] = used.len() as u8;
        assert_eq!(got[..], expected);
    }
}

#[test]
fn garbage_is_not_sent() {
    let mut bench = Bench::new(u64::MAX);
    let packet = Packets::packet(7, 60);
    bench.tx.ram.write_slice(&packet, GuestAddress(DATA)).unwrap();
    for len in [0, 1, 11, 12, 25, 65_563, 0x8_0000] {
        bench.send(&[readable(DATA, len)]);
    }
    bench.send(&[writable(DATA + 0x1000, 100)]);
    assert_eq!(bench.packets.take(), None);
    bench.send(&[readable(DATA, packet.len() as u32)]);
    assert_eq!(bench.packets.take(), Some(packet));
    assert_eq!(bench.tx.events.broken(), None);
}

#[test]
fn one_broken_queue_leaves_the_other_alone() {
    let mut bench = Bench::new(u64::MAX);
    bench.rx.descriptor(0, DATA, 100, NEXT | WRITE, 0);
    bench.rx.publish(0);
    bench.rx.kick();
    assert!(bench.rx.events.wait(|_, broken| broken.is_some()));
    let packet = Packets::packet(7, 60);
    bench.tx.ram.write_slice(&packet, GuestAddress(DATA)).unwrap();
    bench.send(&[readable(DATA, packet.len() as u32)]);
    assert_eq!(bench.packets.take(), Some(packet));

    let mut bench = Bench::new(u64::MAX);
    bench.tx.jump(1000);
    bench.tx.kick_anyway();
    assert!(bench.tx.events.wait(|_, broken| broken.is_some()));
    bench.post(64, 2048);
    bench.packets.put(&Packets::packet(1, 60));
    assert_eq!(bench.rx.wait_used(1), [(0, 72)]);
}

#[test]
fn the_guest_is_told_its_address_and_mtu() {
    let packets = Packets::new();
    let device = packets.device();
    let mut config = [0xff; 16];
    device.read_config(0, &mut config);
    assert_eq!(config[0] & 3, 2, "one station, locally administered");
    assert_eq!(config[6..12], [1, 0, 1, 0, 0xdc, 5]);
    // The stand-in has no offloads, so none are offered; what the guest may leave undone is.
    let features = device.features();
    for bit in [net::VIRTIO_NET_F_GUEST_CSUM, net::VIRTIO_NET_F_GUEST_TSO4, net::VIRTIO_NET_F_GUEST_TSO6] {
        assert_eq!(features & 1 << bit, 0);
    }
    for bit in [net::VIRTIO_NET_F_MAC, net::VIRTIO_NET_F_MTU, net::VIRTIO_NET_F_MRG_RXBUF, net::VIRTIO_NET_F_STATUS] {
        assert_ne!(features & 1 << bit, 0);
    }
}

/// Gives this thread a network of its own, which takes root; `false` if it cannot.
#[expect(unsafe_code, reason = "unshare has no safe wrapper")]
pub fn own_network(what: &str) -> bool {
    // SAFETY: the flag concerns nothing but this thread's view of the network.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    if !done {
        eprintln!("*** NOT TESTED: {what}; run the tests as root");
    }
    done
}

pub fn ip(arguments: &str) {
    let done = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(done.success(), "ip {arguments}");
}

#[test]
fn a_real_tap_carries_packets_both_ways() {
    use crate::backend::{OpenDirectly, Tap, TapError};
    use crate::devices::net::{self as nic, NetLimiters, NetOptions};
    const ARP: [u8; 2] = [8, 6];

    if !own_network("a real tap") {
        return;
    }
    let attach = |name| Tap::attach(&OpenDirectly, name, 1).map(|mut taps| taps.remove(0));
    assert!(matches!(attach("lo"), Err(TapError::NotATap(_))));
    assert!(matches!(attach("tap0"), Err(TapError::NoSuchTap(_))));
    ip("tuntap add dev tun0 mode tun");
    assert!(matches!(attach("tun0"), Err(TapError::NotATap(_))));
    ip("tuntap add dev tap1 mode tap multi_queue");
    assert_eq!(attach("tap1").unwrap().name(), "tap1");
    ip("tuntap add dev tap0 mode tap");
    ip("link set dev tap0 mtu 1400 up");
    ip("addr add 10.0.0.1/24 dev tap0");
    let tap = attach("tap0").unwrap();
    assert!(matches!(attach("tap0"), Err(TapError::Busy(_))));
    assert_eq!((tap.mtu(), tap.offloads().tso6), (1400, true));

    let (options, limiters) = (NetOptions::default(), NetLimiters::default());
    let mut device = nic::device("net0".into(), vec![tap], Vec::new(), options, limiters).unwrap();
    let mut mac = [0; 6];
    device.read_config(0, &mut mac);
    let ram = memory();
    let (mut rx, mut tx) = (Ring::new(&ram, 0, 64, device.features()), Ring::new(&ram, 1, 64, device.features()));
    rx.start(&mut device, None);
    tx.start(&mut device, None);
    for i in 0..64 {
        rx.chain(i, &[writable(DATA + u64::from(i) * 2048, 2048)], false);
        rx.publish(i);
    }
    rx.kick();
    // Receives until a frame of this type comes.
    let mut receive = |kind: [u8; 2]| loop {
        for (head, len) in rx.wait_used(1) {
            let mut packet = vec![0; len as usize];
            ram.read_slice(&mut packet, GuestAddress(DATA + u64::from(head) * 2048)).unwrap();
            rx.publish(head as u16);
            rx.kick();
            if packet[24..26] == kind {
                assert_eq!(packet[10..12], [1, 0], "one buffer");
                return packet;
            }
        }
    };
    let socket = std::net::UdpSocket::bind("10.0.0.1:0").unwrap();
    socket.send_to(b"are you there", "10.0.0.2:7").unwrap();
    let request = receive(ARP);
    // 10.0.0.2 is at our address.
    let mut reply = request.clone();
    reply[..12].fill(0);
    reply[12..18].copy_from_slice(&request[18..24]);
    reply[18..24].copy_from_slice(&mac);
    reply[33] = 2;
    reply[34..40].copy_from_slice(&mac);
    reply[40..44].copy_from_slice(&[10, 0, 0, 2]);
    reply[44..54].copy_from_slice(&request[34..44]);
    ram.write_slice(&reply, GuestAddress(0x1c_0000)).unwrap();
    tx.chain(0, &[readable(0x1c_0000, reply.len() as u32)], false);
    tx.publish(0);
    tx.kick();
    assert_eq!(tx.wait_used(1), [(0, 0)]);
    let datagram = receive([8, 0]);
    assert!(datagram.ends_with(b"are you there"));
    // The checksum was left to us: VIRTIO_NET_HDR_F_NEEDS_CSUM.
    assert_eq!(datagram[0] & 1, 1);
}
