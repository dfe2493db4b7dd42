//! The control queue (virtio 1.2, section 5.1.6.5): commands of a class, a number and data, each answered by a byte.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net as net;

use super::card::{Card, Pace};
use crate::devices::worker::{Engine, Served, Turn, serve_each};
use crate::memory::{IoBuf, Ram};
use crate::observe::guest_warning;
use crate::virtio::{Chain, RingError, Virtqueue};

const OK: u8 = net::VIRTIO_NET_OK as u8;
const ERR: u8 = net::VIRTIO_NET_ERR as u8;

/// Class, number, and the longest data of a command we know.
const LONGEST: usize = 2 + 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Mac([u8; 6]),
    Pairs(u16),
    Offloads(u64),
}

impl Command {
    /// `None` for what is not offered or has not just the data it needs.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (&[class, number], data) = bytes.split_first_chunk()?;
        match (class.into(), number.into()) {
            (net::VIRTIO_NET_CTRL_MAC, net::VIRTIO_NET_CTRL_MAC_ADDR_SET) => data.try_into().ok().map(Self::Mac),
            (net::VIRTIO_NET_CTRL_MQ, net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                data.try_into().ok().map(|count| Self::Pairs(u16::from_le_bytes(count)))
            }
            (net::VIRTIO_NET_CTRL_GUEST_OFFLOADS, net::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                data.try_into().ok().map(|bits| Self::Offloads(u64::from_le_bytes(bits)))
            }
            _ => None,
        }
    }

    /// The feature without which there is no such command.
    fn feature(self) -> u32 {
        match self {
            Self::Mac(_) => net::VIRTIO_NET_F_CTRL_MAC_ADDR,
            Self::Pairs(_) => net::VIRTIO_NET_F_MQ,
            Self::Offloads(_) => net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        }
    }
}

pub struct ControlEngine {
    name: String,
    card: Arc<Card>,
    features: u64,
    pace: Pace,
}

impl ControlEngine {
    pub fn new(name: String, card: Arc<Card>) -> Self {
        Self { name, card, features: 0, pace: Pace::default() }
    }

    fn execute(&mut self, request: &IoBuf) -> u8 {
        // A byte more, so that what is too long is seen to be.
        let mut bytes = [0; LONGEST + 1];
        let len = request.copy_to(&mut bytes);
        let command = Command::parse(&bytes[..len]).filter(|command| self.features & 1 << command.feature() != 0);
        let done = match command {
            None => return ERR,
            Some(Command::Mac(mac)) if mac[0] & 1 != 0 => return ERR,
            Some(Command::Mac(mac)) => {
                self.card.set_mac(mac);
                Ok(())
            }
            Some(Command::Pairs(count)) if !(1..=self.card.pairs()).contains(&count) => return ERR,
            Some(Command::Pairs(count)) => {
                self.pace.wait();
                self.card.set_active_pairs(count)
            }
            Some(Command::Offloads(wanted)) => {
                self.pace.wait();
                match self.card.choose_offloads(wanted, self.features) {
                    Some(done) => done,
                    None => return ERR,
                }
            }
        };
        match done {
            Ok(()) => OK,
            Err(error) => {
                guest_warning!("{}: the host refuses {command:x?}: {error}", self.name);
                ERR
            }
        }
    }
}

impl Engine for ControlEngine {
    fn start(&mut self, _index: u16, features: u64, _ram: &Ram) -> io::Result<()> {
        self.features = features;
        Ok(())
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        serve_each(queue, chain, turn, |chain, _| {
            let answer = self.execute(&chain.readable);
            Ok(chain.writable.copy_from(&[answer]) as u32)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::OwnedFd;
    use vm_memory::{Bytes, GuestAddress};

    use crate::backend::Tap;
    use crate::devices::front::DeviceConfig;
    use crate::memory::anonymous;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn control(features: u64) -> ControlEngine {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let card = Card::new(MAC, 1500, vec![Arc::new(Tap::from_packets(fd, 1500))]);
        let mut control = ControlEngine::new("net0".into(), Arc::new(card));
        let ram = anonymous(&[(GuestAddress(0), 0x1000)]).unwrap();
        control.start(2, features, &ram).unwrap();
        control
    }

    fn answer(control: &mut ControlEngine, command: &[u8]) -> u8 {
        let ram = anonymous(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        ram.write_slice(command, GuestAddress(0)).unwrap();
        let mut request = IoBuf::new(ram);
        // In two pieces, as drivers do.
        let first = command.len().min(2);
        request.push(0, first as u32).unwrap();
        request.push(first as u64, (command.len() - first) as u32).unwrap();
        control.execute(&request)
    }

    fn mac(control: &ControlEngine) -> [u8; 6] {
        let mut mac = [0; 6];
        control.card.read(0, &mut mac);
        mac
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        for command in [&[1u8, 1, 2, 2, 3, 4, 5, 6][..], &[4, 0, 1, 0], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(answer(&mut control(0), command), ERR, "{command:?}");
            assert_eq!(answer(&mut control(u64::MAX), command), OK, "{command:?}");
            let longer = [command, &[0]].concat();
            for wrong in [&command[..command.len() - 1], &longer] {
                assert_eq!(answer(&mut control(u64::MAX), wrong), ERR, "{wrong:?}");
            }
        }
    }

    #[test]
    fn an_address_is_taken_unless_it_is_many_stations() {
        let mut control = control(1 << net::VIRTIO_NET_F_CTRL_MAC_ADDR);
        assert_eq!(answer(&mut control, &[1, 1, 0x0a, 1, 2, 3, 4, 5]), OK);
        assert_eq!(answer(&mut control, &[1, 1, 0x0b, 1, 2, 3, 4, 5]), ERR);
        assert_eq!(mac(&control), [0x0a, 1, 2, 3, 4, 5]);
        control.card.reset();
        assert_eq!(mac(&control), MAC);
    }

    #[test]
    fn no_more_pairs_than_there_are() {
        let mut control = control(u64::MAX);
        for (low, high, expected) in [(0, 0, ERR), (1, 0, OK), (2, 0, ERR), (0, 0x80, ERR), (0xff, 0xff, ERR)] {
            assert_eq!(answer(&mut control, &[4, 0, low, high]), expected);
        }
    }

    #[test]
    fn only_negotiated_offloads_can_be_chosen() {
        let features = 1 << net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS | 1 << net::VIRTIO_NET_F_GUEST_ECN;
        let set = |bits: u64| [&[5, 0], &bits.to_le_bytes()[..]].concat();
        let mut control = control(features);
        assert_eq!(answer(&mut control, &set(1 << net::VIRTIO_NET_F_GUEST_ECN)), OK);
        assert_eq!(answer(&mut control, &set(1 << net::VIRTIO_NET_F_GUEST_CSUM)), ERR);
        assert_eq!(answer(&mut control, &set(1 << net::VIRTIO_NET_F_MQ)), ERR);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(command in proptest::collection::vec(any::<u8>(), 0..64), features: u64) {
            let mut control = control(features);
            let known = answer(&mut control, &command) == OK;
            prop_assert!(!known || Command::parse(&command).is_some());
            prop_assert!(mac(&control) == MAC || command[..2] == [1, 1]);
        }

        #[test]
        fn long_commands_are_not_read_to_the_end(extra in 1usize..0xfff0) {
            let mut command = vec![0; 4 + extra];
            command[0] = 4;
            command[2] = 1;
            prop_assert_eq!(answer(&mut control(u64::MAX), &command), ERR);
        }
    }
}
