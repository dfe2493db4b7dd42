//! What is particular to a card over a stream: no packet is lost to a slow reader, and the stream can end.

use std::io::{Read as _, Write as _};

use virtio_bindings::virtio_net as net;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Ring, memory, readable, writable};
use super::specimens::Packets;
use crate::backend::Passt;
use crate::devices::net::{self as nic, NetLimiters, NetOptions, NetShapeV1};
use crate::virtio::{VirtioDevice, feature};

const DATA: u64 = 0x10_0000;

fn start(device: &mut dyn VirtioDevice) -> (Ring, Ring) {
    let (ram, features) = (memory(), device.features());
    let (rx, tx) = (Ring::new(&ram, 0, 64, features), Ring::new(&ram, 1, 64, features));
    rx.start(device, None);
    tx.start(device, None);
    (rx, tx)
}

fn link_is_up(device: &dyn VirtioDevice) -> bool {
    let mut config = [0; 8];
    device.read_config(0, &mut config);
    config[6] == 1
}

#[test]
fn nothing_is_lost_when_the_other_side_is_slow() {
    let mut packets = Packets::by_stream();
    let mut device = packets.device();
    let (_rx, mut tx) = start(&mut *device);
    // More than the socket takes: 64 x 16,000 bytes.
    for n in 0..64 {
        let packet = Packets::packet(n.into(), 16_000);
        let at = DATA + u64::from(n) * 0x4000;
        tx.ram.write_slice(&packet, GuestAddress(at)).unwrap();
        tx.chain(n, &[readable(at, packet.len() as u32)], false);
        tx.publish(n);
    }
    tx.kick();
    let mut reader = packets.reader();
    for n in 0..64 {
        let mut frame = [0; 4 + 16_000];
        reader.read_exact(&mut frame).unwrap();
        assert_eq!(frame[..4], 16_000u32.to_be_bytes());
        assert_eq!(frame[4..], Packets::packet(n, 16_000)[12..]);
    }
    assert_eq!(tx.wait_used(64).len(), 64);
    reader.set_nonblocking(true).unwrap();
    assert_eq!(packets.take(), None);
}

#[test]
fn when_the_other_side_ends_the_cable_is_out() {
    for garbage in [&[][..], &[0xff; 4], &[0, 1, 0, 0]] {
        let mut packets = Packets::by_stream();
        let mut device = packets.device();
        let (mut rx, mut tx) = start(&mut *device);
        rx.chain(0, &[writable(DATA, 2048)], false);
        rx.publish(0);
        rx.kick();
        assert!(link_is_up(&*device));
        packets.put(&Packets::packet(7, 100));
        assert_eq!(rx.wait_used(1), [(0, 112)]);
        rx.publish(0);
        rx.kick();
        packets.ours.write_all(garbage).unwrap();
        if garbage.is_empty() {
            packets.hang_up();
        }
        assert!(rx.events.wait(|events, _| events.config_changes() == 1), "{garbage:?}");
        assert!(!link_is_up(&*device));
        // What is sent now goes nowhere, and comes back as sent.
        tx.chain(0, &[readable(DATA, 100)], false);
        tx.publish(0);
        tx.kick();
        assert_eq!(tx.wait_used(1), [(0, 0)]);
        // A reset does not bring the cable back.
        device.stop_queue(0).unwrap();
        device.reset();
        assert!(!link_is_up(&*device));
        assert_eq!(tx.events.broken(), None);
    }
}

#[test]
fn a_frame_that_cannot_be_one_is_dropped_alone() {
    let mut packets = Packets::by_stream();
    let mut device = packets.device();
    let (mut rx, _tx) = start(&mut *device);
    for (i, len) in [(0, 0), (1, 13), (2, 65_535)] {
        packets.ours.write_all(&u32::to_be_bytes(len)).unwrap();
        packets.ours.write_all(&vec![i; len as usize]).unwrap();
    }
    packets.put(&Packets::packet(3, 60));
    for i in 0..64 {
        rx.chain(i, &[writable(DATA + u64::from(i) * 256, 256)], false);
        rx.publish(i);
    }
    rx.kick();
    // 64 buffers are too few for the longest.
    assert_eq!(rx.wait_used(1), [(0, 72)]);
    assert!(link_is_up(&*device));
}

#[test]
fn nothing_is_offered_that_passt_would_have_to_do() {
    let features = Packets::by_stream().device().features();
    for bit in [
        net::VIRTIO_NET_F_CSUM,
        net::VIRTIO_NET_F_GUEST_CSUM,
        net::VIRTIO_NET_F_HOST_TSO4,
        net::VIRTIO_NET_F_HOST_TSO6,
        net::VIRTIO_NET_F_HOST_ECN,
        net::VIRTIO_NET_F_HOST_USO,
        net::VIRTIO_NET_F_GUEST_TSO4,
        net::VIRTIO_NET_F_GUEST_TSO6,
        net::VIRTIO_NET_F_GUEST_USO4,
        net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        net::VIRTIO_NET_F_MQ,
    ] {
        assert_eq!(features & 1 << bit, 0, "feature {bit}");
    }
    assert_eq!(features & feature::VERSION_1, feature::VERSION_1);
}

#[test]
fn a_card_with_offloads_does_not_move_into_a_user_network() {
    let shape_of = |device: &dyn VirtioDevice| {
        let mut config = [0; 12];
        device.read_config(0, &mut config);
        let mac = config[..6].try_into().unwrap();
        NetShapeV1 { mac, mtu: u16::from_le_bytes([config[10], config[11]]), features: device.features(), pairs: 1 }
    };
    let move_to_user = |shape| {
        let passt = Passt::played_by(std::os::unix::net::UnixStream::pair().unwrap().0, 65_520);
        let options = NetOptions { shape: Some(shape), ..NetOptions::default() };
        nic::user_device("net0".into(), passt, options, NetLimiters::default())
    };
    // The other way is open: the card stays as it was.
    let user = shape_of(&*Packets::by_stream().device());
    let moved = Packets::with("net0", 9000).device_of(NetOptions { shape: Some(user), ..NetOptions::default() });
    assert_eq!(shape_of(&*moved.unwrap()), user);
    assert_eq!(shape_of(&move_to_user(user).unwrap()), user);
    let error = move_to_user(shape_of(&*Packets::new().device())).err().expect("it has offloads");
    assert!(error.to_string().ends_with("cannot: CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN"), "{error}");
}
