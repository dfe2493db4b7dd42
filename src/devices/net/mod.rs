//! virtio-net over a tap, or over passt (virtio 1.2, section 5.1).
//!
//! ```text
//!   queues 0, 1 ──── first pair ────┐             each pair: a thread of ours, or vhost
//!   queues 2, 3 ──── second pair ───┼── tap
//!   ...                             │
//!   the last one ─── control ───────┘  card: MAC address, offloads, how many pairs are in use
//! ```
//! The host spreads flows over the pairs in use: the first one, until the driver asks for more.

mod card;
mod control;
mod held;
mod pair;
mod relay;
mod shape;
mod state;
mod user;
mod vhost;

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_net as net;

pub(crate) use self::card::Card;
use self::card::offered;
use self::control::ControlEngine;
pub(crate) use self::pair::PairEngine;
use self::relay::Relay;
pub use self::shape::{NetShapeV1, ShapeError};
pub use self::state::{NetStateV1, saved_shape};
pub(crate) use self::user::UserEngine;
use self::vhost::VhostPair;
use super::front::{Front, QueueServer};
use super::worker::Worker;
use crate::backend::tap::HEADER_BYTES;
use crate::backend::{Limiter, Offloads, Passt, Tap, VhostNet};
use crate::config::{MacAddress, RateLimits};
use crate::virtio::{DeviceKind, feature};

const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;

const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;

/// The smallest MTU that may be announced (section 5.1.4.1).
const MIN_MTU: u16 = 68;

const MQ: u64 = 1 << net::VIRTIO_NET_F_MQ;

/// The queues of a pair: the one that receives, and the one that sends (section 5.1.2).
const fn rx_of(pair: u16) -> u16 {
    2 * pair
}
const fn tx_of(pair: u16) -> u16 {
    2 * pair + 1
}

/// Where the control queue is for a driver that does not know of several pairs: right after the first (section 5.1.2).
const CONTROL_WITHOUT_MQ: u16 = rx_of(1);

#[derive(Debug, Clone, Copy, Default)]
pub struct NetOptions {
    /// A random one, locally administered, when absent.
    pub mac: Option<MacAddress>,
    /// In bytes, without the Ethernet header; the back end's when absent.
    pub mtu: Option<u16>,
    /// That of a card which a guest knows already: it is made again, or refused. The rest is not looked at then.
    pub shape: Option<NetShapeV1>,
}

impl NetOptions {
    /// The shape of a card over a back end that can do so much.
    fn shape(&self, mut features: u64, mtu: u16, pairs: u16) -> io::Result<NetShapeV1> {
        let mtu = self.shape.map(|shape| shape.mtu).or(self.mtu).unwrap_or(mtu);
        if mtu >= MIN_MTU {
            features |= 1 << net::VIRTIO_NET_F_MTU;
        }
        match self.shape {
            Some(shape) => {
                shape.fits(features, pairs).map_err(|error| io::Error::new(io::ErrorKind::Unsupported, error))?;
                Ok(shape)
            }
            None => Ok(NetShapeV1 { mac: self.mac.map_or_else(random_mac, |mac| Ok(mac.0))?, mtu, features, pairs }),
        }
    }
}

/// How much a card may receive and send, whichever of its pairs does it.
#[derive(Debug, Clone, Default)]
pub struct NetLimiters {
    pub rx: Arc<Limiter>,
    pub tx: Arc<Limiter>,
}

impl NetLimiters {
    #[must_use]
    pub fn new(rx: RateLimits, tx: RateLimits) -> Self {
        Self { rx: Arc::new(Limiter::new(rx)), tx: Arc::new(Limiter::new(tx)) }
    }

    fn both(&self) -> Vec<Arc<Limiter>> {
        vec![self.rx.clone(), self.tx.clone()]
    }
}

/// What counts of a packet with its header.
fn frame_bytes(packet_bytes: usize) -> u64 {
    packet_bytes.saturating_sub(HEADER_BYTES) as u64
}

/// A card on the queues of a tap, a pair on each; with as many `vhost`s, the host's kernel serves them, which knows
/// nothing of the limiters.
///
/// # Panics
/// Without a tap queue.
pub fn device(
    name: String,
    taps: Vec<Tap>,
    vhosts: Vec<VhostNet>,
    options: NetOptions,
    limiters: NetLimiters,
) -> io::Result<Front> {
    let shape = options.shape(features(&taps, &vhosts), taps[0].mtu(), taps.len() as u16)?;
    let taps: Vec<_> = taps.into_iter().map(Arc::new).collect();
    let card = Arc::new(Card::new(shape.mac, shape.mtu, taps.clone()));
    let servers = if vhosts.is_empty() {
        serve_with_threads(&name, &taps, &card, &limiters)?
    } else {
        serve_with_vhost(&name, &taps, vhosts, &card)?
    };
    // Not sooner: a thread begins to listen to its tap queue while that is in use.
    card.set_active_pairs(1)?;
    let front = Front::new(DeviceKind::Net, name, shape.features, card, servers);
    Ok(if taps.len() > 1 { front.fewer_queues_without(MQ, CONTROL_WITHOUT_MQ, 0) } else { front })
}

/// A card in a user network, whose frames passt carries.
pub fn user_device(name: String, passt: Passt, options: NetOptions, limiters: NetLimiters) -> io::Result<Front> {
    let shape = options.shape(PLAIN, passt.mtu(), 1)?;
    let card = Arc::new(Card::new(shape.mac, shape.mtu, Vec::new()));
    let engine = UserEngine::new(name.clone(), passt, card.clone(), limiters);
    let queues = [(rx_of(0), QUEUE_SIZE), (tx_of(0), QUEUE_SIZE), (rx_of(1), CONTROL_SIZE)];
    let worker = Worker::spawn(&name, Box::new(engine), &queues)?;
    Ok(Front::new(DeviceKind::Net, name, shape.features, card, vec![Box::new(worker)]))
}

/// What the rings themselves are like, which vhost has to know too.
const RINGS: u64 = feature::RING | 1 << net::VIRTIO_NET_F_MRG_RXBUF;

/// What every card has, wherever its frames go. Nothing is in it that the other end of the wire would have to do.
const PLAIN: u64 = RINGS
    | 1 << net::VIRTIO_NET_F_MAC
    | 1 << net::VIRTIO_NET_F_STATUS
    | 1 << net::VIRTIO_NET_F_CTRL_VQ
    | 1 << net::VIRTIO_NET_F_CTRL_MAC_ADDR;

fn features(taps: &[Tap], vhosts: &[VhostNet]) -> u64 {
    let plain = vhosts.iter().fold(PLAIN, |plain, vhost| plain & (vhost.features() | !RINGS));
    // A tap takes any packet with a header, whatever the host then has to do to it.
    let mut features = plain
        | 1 << net::VIRTIO_NET_F_CSUM
        | 1 << net::VIRTIO_NET_F_HOST_TSO4
        | 1 << net::VIRTIO_NET_F_HOST_TSO6
        | 1 << net::VIRTIO_NET_F_HOST_ECN;
    let offloads = taps[0].offloads();
    features |= offered(offloads);
    if offloads != Offloads::NONE {
        features |= 1 << net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    }
    if offloads.uso {
        // The same kernels can do it the other way round.
        features |= 1 << net::VIRTIO_NET_F_HOST_USO;
    }
    if taps.len() > 1 {
        features |= MQ;
    }
    features
}

/// The control queue's places besides the first pair's: the last, and that of a driver that knows one pair only.
fn control_queues(pairs: u16) -> ((u16, u16), Option<(u16, u16)>) {
    let other = (pairs > 1).then_some((CONTROL_WITHOUT_MQ, QUEUE_SIZE));
    ((rx_of(pairs), CONTROL_SIZE), other)
}

fn serve_with_threads(
    name: &str,
    taps: &[Arc<Tap>],
    card: &Arc<Card>,
    limiters: &NetLimiters,
) -> io::Result<Vec<Box<dyn QueueServer>>> {
    let (control, other) = control_queues(card.pairs());
    let serve = |(pair, tap): (u16, &Arc<Tap>)| -> io::Result<Box<dyn QueueServer>> {
        let engine = Box::new(PairEngine::new(name.to_owned(), pair, tap.clone(), card.clone(), limiters.clone()));
        let (rx, tx) = ((rx_of(pair), QUEUE_SIZE), (tx_of(pair), QUEUE_SIZE));
        Ok(Box::new(match pair {
            0 => Worker::spawn_with(name, engine, &[rx, tx, control], other)?,
            _ => Worker::spawn(&format!("{name}.{pair}"), engine, &[rx, tx])?,
        }))
    };
    (0..).zip(taps).map(serve).collect()
}

fn serve_with_vhost(
    name: &str,
    taps: &[Arc<Tap>],
    vhosts: Vec<VhostNet>,
    card: &Arc<Card>,
) -> io::Result<Vec<Box<dyn QueueServer>>> {
    let (control, other) = control_queues(card.pairs());
    let engine = ControlEngine::new(name.to_owned(), card.clone());
    let relay = Arc::new(Relay::spawn(&format!("{name}.vhost"), rx_of(card.pairs()))?);
    let control = Worker::spawn_with(name, Box::new(engine), &[control], other)?;
    let mut servers: Vec<Box<dyn QueueServer>> = vec![Box::new(control)];
    for ((pair, tap), vhost) in (0..).zip(taps).zip(vhosts) {
        servers.push(Box::new(VhostPair::new(pair, vhost, tap.clone(), card.clone(), relay.clone())));
    }
    Ok(servers)
}

/// An address for a card that has none yet.
pub fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    getrandom(&mut mac, GetRandomFlags::empty())?;
    // Locally administered, and one station's own.
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}
