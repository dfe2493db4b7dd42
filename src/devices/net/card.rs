//! What a card is besides its queues: its configuration space, and what the driver has told it through the control
//! queue. The pairs never look here while they move frames.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net as net;
use zerocopy::{Immutable, IntoBytes, little_endian as le};

use super::shape::NetShapeV1;
use super::state::{self, NetStateV1};
use crate::backend::{Offloads, Tap};
use crate::devices::front::DeviceConfig;
use crate::virtio::device::read_config_bytes;
use crate::virtio::{DeviceKind, OwnStateV1, StateError};

/// The guest's offloads, as feature bits and as the control queue names them.
const OFFLOADS: u64 = 1 << net::VIRTIO_NET_F_GUEST_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_TSO4
    | 1 << net::VIRTIO_NET_F_GUEST_TSO6
    | 1 << net::VIRTIO_NET_F_GUEST_ECN
    | USO;
const USO: u64 = 1 << net::VIRTIO_NET_F_GUEST_USO4 | 1 << net::VIRTIO_NET_F_GUEST_USO6;

/// The least time between changes to the tap, which take the lock that the host's whole network shares.
const PACE: Duration = Duration::from_millis(10);

/// `struct virtio_net_config`, to the end of what we offer.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: le::U16,
    max_virtqueue_pairs: le::U16,
    mtu: le::U16,
}

/// A card. Its taps are those of its pairs, none for a card that is not on a tap.
pub struct Card {
    own_mac: [u8; 6],
    /// The one of now, in the first six bytes.
    mac: AtomicU64,
    mtu: u16,
    link_up: AtomicBool,
    taps: Vec<Arc<Tap>>,
    /// How many pairs the host hands frames to.
    active: AtomicU16,
    /// The offloads the driver has chosen since it negotiated them.
    chosen: AtomicU64,
    /// Those that the tap was told last.
    applied: AtomicU64,
}

/// Nothing chosen, or nothing told.
const NONE: u64 = u64::MAX;

impl Card {
    pub fn new(mac: [u8; 6], mtu: u16, taps: Vec<Arc<Tap>>) -> Self {
        Self {
            own_mac: mac,
            mac: AtomicU64::new(pack(mac)),
            mtu,
            link_up: AtomicBool::new(true),
            active: AtomicU16::new(taps.len() as u16),
            taps,
            chosen: AtomicU64::new(NONE),
            applied: AtomicU64::new(NONE),
        }
    }

    pub fn pairs(&self) -> u16 {
        self.taps.len().max(1) as u16
    }

    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    pub fn set_mac(&self, mac: [u8; 6]) {
        self.mac.store(pack(mac), Ordering::Relaxed);
    }

    /// The cable is out, for good: whoever finds that out tells the driver that the configuration has changed.
    pub fn set_link_down(&self) {
        self.link_up.store(false, Ordering::Relaxed);
    }

    /// Lets the host spread frames over the first `count` pairs.
    ///
    /// # Errors
    /// When the tap refuses; the number is then somewhere between the old and the new one.
    pub fn set_active_pairs(&self, count: u16) -> io::Result<()> {
        let active = self.active.load(Ordering::Relaxed);
        // In this order a pair's tap queue keeps the pair's number.
        for pair in active..count {
            self.taps[usize::from(pair)].set_active(true)?;
            self.active.store(pair + 1, Ordering::Relaxed);
        }
        for pair in (count..active).rev() {
            self.taps[usize::from(pair)].set_active(false)?;
            self.active.store(pair, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Has the tap do what the driver of these features wants of it.
    pub fn apply_offloads(&self, features: u64) -> io::Result<()> {
        let Some(tap) = self.taps.first() else { return Ok(()) };
        let chosen = self.chosen.load(Ordering::Relaxed);
        let wanted = if chosen == NONE { features & OFFLOADS } else { chosen };
        if self.applied.load(Ordering::Relaxed) != wanted {
            tap.set_offloads(offloads(wanted))?;
            self.applied.store(wanted, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Chooses among the offloads that were negotiated; `None` if there are others in it.
    pub fn choose_offloads(&self, wanted: u64, features: u64) -> Option<io::Result<()>> {
        (wanted & !(features & OFFLOADS) == 0).then(|| {
            let before = self.chosen.swap(wanted, Ordering::Relaxed);
            self.apply_offloads(features).inspect_err(|_| self.chosen.store(before, Ordering::Relaxed))
        })
    }
}

impl Card {
    fn shape(&self, features: u64) -> NetShapeV1 {
        NetShapeV1 { mac: self.own_mac, mtu: self.mtu, features, pairs: self.pairs() }
    }
}

impl DeviceConfig for Card {
    fn read(&self, offset: usize, data: &mut [u8]) {
        let [mac @ .., _, _] = self.mac.load(Ordering::Relaxed).to_le_bytes();
        let link = if self.link_up.load(Ordering::Relaxed) { net::VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let config =
            Config { mac, status: link.into(), max_virtqueue_pairs: self.pairs().into(), mtu: self.mtu.into() };
        read_config_bytes(config.as_bytes(), offset, data);
    }

    /// One pair, as the next driver may not know of others (virtio 1.2, 5.1.6.5.5).
    fn reset(&self) {
        self.set_mac(self.own_mac);
        self.chosen.store(NONE, Ordering::Relaxed);
        if let Err(error) = self.set_active_pairs(1.min(self.taps.len() as u16)) {
            tracing::error!("a tap's queues cannot be put to rest: {error}");
        }
    }

    fn save(&self, offered: u64) -> OwnStateV1 {
        let [mac @ .., _, _] = self.mac.load(Ordering::Relaxed).to_le_bytes();
        let chosen = self.chosen.load(Ordering::Relaxed);
        let state = NetStateV1 {
            shape: self.shape(offered),
            mac,
            active_pairs: self.active.load(Ordering::Relaxed).max(1),
            chosen_offloads: (chosen != NONE).then_some(chosen),
            link_up: self.link_up.load(Ordering::Relaxed),
        };
        OwnStateV1::new(DeviceKind::Net, state::VERSION, &state)
    }

    fn check(&self, own: &OwnStateV1, offered: u64, accepted: u64) -> Result<(), StateError> {
        let NetStateV1 { shape, mac, active_pairs, chosen_offloads, .. } =
            own.parse(DeviceKind::Net, state::VERSION)?;
        let wrong = |field: &str, problem: String| Err(StateError::new(format!("state.{field}"), problem));
        if shape != self.shape(offered) {
            return wrong("shape", format!("the card is {:?}, and not {shape:?}", self.shape(offered)));
        }
        if mac[0] & 1 != 0 {
            return wrong("mac", format!("{mac:x?} is not one station's"));
        }
        if !(1..=self.pairs()).contains(&active_pairs) {
            return wrong("active_pairs", format!("{active_pairs} of {}", self.pairs()));
        }
        if let Some(chosen) = chosen_offloads.filter(|chosen| chosen & !(accepted & OFFLOADS) != 0) {
            return wrong("chosen_offloads", format!("{chosen:#x} are not all among those that were negotiated"));
        }
        Ok(())
    }

    /// The cable of a card that is made again is in.
    fn restore(&self, own: &OwnStateV1) -> io::Result<bool> {
        let saved: NetStateV1 = own.parse(DeviceKind::Net, state::VERSION).map_err(io::Error::other)?;
        self.set_mac(saved.mac);
        self.chosen.store(saved.chosen_offloads.unwrap_or(NONE), Ordering::Relaxed);
        self.set_active_pairs(saved.active_pairs.min(self.taps.len() as u16))?;
        Ok(saved.link_up != self.link_up.load(Ordering::Relaxed))
    }
}

/// The queues keep the device alive, and the device its configuration.
impl DeviceConfig for Arc<Card> {
    fn read(&self, offset: usize, data: &mut [u8]) {
        Card::read(self, offset, data);
    }

    fn reset(&self) {
        Card::reset(self);
    }

    fn save(&self, offered: u64) -> OwnStateV1 {
        Card::save(self, offered)
    }

    fn check(&self, own: &OwnStateV1, offered: u64, accepted: u64) -> Result<(), StateError> {
        Card::check(self, own, offered, accepted)
    }

    fn restore(&self, own: &OwnStateV1) -> io::Result<bool> {
        Card::restore(self, own)
    }
}

fn pack(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

/// What a driver of these features leaves to the host.
pub fn offloads(features: u64) -> Offloads {
    let has = |bit: u32| features & 1 << bit != 0;
    Offloads {
        checksum: has(net::VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(net::VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(net::VIRTIO_NET_F_GUEST_TSO6),
        ecn: has(net::VIRTIO_NET_F_GUEST_ECN),
        // The host cannot tell them apart.
        uso: features & USO == USO,
    }
}

/// What a tap offers its guest.
pub fn offered(offloads: Offloads) -> u64 {
    let bit = |has: bool, bit: u32| if has { 1 << bit } else { 0 };
    bit(offloads.checksum, net::VIRTIO_NET_F_GUEST_CSUM)
        | bit(offloads.tso4, net::VIRTIO_NET_F_GUEST_TSO4)
        | bit(offloads.tso6, net::VIRTIO_NET_F_GUEST_TSO6)
        | bit(offloads.ecn, net::VIRTIO_NET_F_GUEST_ECN)
        | if offloads.uso { USO } else { 0 }
}

/// Keeps changes apart that a guest may ask for without end.
#[derive(Default)]
pub struct Pace(Option<Instant>);

impl Pace {
    /// Waits until the next change is due.
    pub fn wait(&mut self) {
        let due = self.0.map_or(Duration::ZERO, |last| PACE.saturating_sub(last.elapsed()));
        if !due.is_zero() {
            std::thread::sleep(due);
        }
        self.0 = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_are_feature_bits() {
        let all = offered(Offloads::ALL);
        assert_eq!(all, OFFLOADS);
        assert_eq!(offloads(all), Offloads::ALL);
        assert_eq!((offered(Offloads::NONE), offloads(!OFFLOADS)), (0, Offloads::NONE));
        assert!(!offloads(all & !(1 << net::VIRTIO_NET_F_GUEST_USO4)).uso);
    }

    #[test]
    fn a_card_on_no_tap_has_one_pair() {
        let card = Card::new([2, 0, 0, 0, 0, 1], 1500, Vec::new());
        assert_eq!(card.pairs(), 1);
        card.set_mac([6, 5, 4, 3, 2, 1]);
        let mut config = [0xff; 13];
        card.read(0, &mut config);
        assert_eq!(config, [6, 5, 4, 3, 2, 1, 1, 0, 1, 0, 0xdc, 5, 0xff]);
        card.reset();
        card.read(4, &mut config);
        assert_eq!(config[..2], [0, 1]);
        assert!(card.choose_offloads(1, 0).is_none());
    }
}
