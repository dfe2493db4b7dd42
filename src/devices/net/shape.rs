//! What a guest has been promised of its card. A saved VM holds on to it: the card it finds when it wakes up, on
//! whatever back end, has to be the same.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_net as net;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetShapeV1 {
    pub mac: [u8; 6],
    /// In bytes.
    pub mtu: u16,
    /// Feature bits as they were offered.
    pub features: u64,
    /// Pairs of queues.
    pub pairs: u16,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ShapeError {
    #[error("the guest's network card can do what its new back end cannot: {0}")]
    Features(String),
    #[error("the guest's network card has {wanted} pairs of queues, and its new back end {offered}")]
    Pairs { wanted: u16, offered: u16 },
}

/// As section 5.1.3 calls them, without `VIRTIO_NET_F_`.
const NAMES: [(u32, &str); 18] = [
    (net::VIRTIO_NET_F_CSUM, "CSUM"),
    (net::VIRTIO_NET_F_GUEST_CSUM, "GUEST_CSUM"),
    (net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, "CTRL_GUEST_OFFLOADS"),
    (net::VIRTIO_NET_F_MTU, "MTU"),
    (net::VIRTIO_NET_F_MAC, "MAC"),
    (net::VIRTIO_NET_F_GUEST_TSO4, "GUEST_TSO4"),
    (net::VIRTIO_NET_F_GUEST_TSO6, "GUEST_TSO6"),
    (net::VIRTIO_NET_F_GUEST_ECN, "GUEST_ECN"),
    (net::VIRTIO_NET_F_HOST_TSO4, "HOST_TSO4"),
    (net::VIRTIO_NET_F_HOST_TSO6, "HOST_TSO6"),
    (net::VIRTIO_NET_F_HOST_ECN, "HOST_ECN"),
    (net::VIRTIO_NET_F_MRG_RXBUF, "MRG_RXBUF"),
    (net::VIRTIO_NET_F_STATUS, "STATUS"),
    (net::VIRTIO_NET_F_MQ, "MQ"),
    (net::VIRTIO_NET_F_CTRL_MAC_ADDR, "CTRL_MAC_ADDR"),
    (net::VIRTIO_NET_F_GUEST_USO4, "GUEST_USO4"),
    (net::VIRTIO_NET_F_GUEST_USO6, "GUEST_USO6"),
    (net::VIRTIO_NET_F_HOST_USO, "HOST_USO"),
];

impl NetShapeV1 {
    /// Can such a card be made over a back end that has these features and pairs?
    ///
    /// # Errors
    /// What it lacks.
    pub fn fits(&self, features: u64, pairs: u16) -> Result<(), ShapeError> {
        let missing = self.features & !features;
        if missing != 0 {
            let name = |bit| match NAMES.iter().find(|name| name.0 == bit) {
                Some(&(_, name)) => name.to_owned(),
                None => format!("feature {bit}"),
            };
            let names: Vec<_> = (0..u64::BITS).filter(|bit| missing & 1 << bit != 0).map(name).collect();
            return Err(ShapeError::Features(names.join(", ")));
        }
        if self.pairs != pairs {
            return Err(ShapeError::Pairs { wanted: self.pairs, offered: pairs });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_has_a_name() {
        let shape = |features, pairs| NetShapeV1 { mac: [2; 6], mtu: 1500, features, pairs };
        let offered = 1 << net::VIRTIO_NET_F_MAC | 1 << net::VIRTIO_NET_F_STATUS;
        assert_eq!(shape(offered, 1).fits(offered, 1), Ok(()));
        assert_eq!(shape(0, 1).fits(offered, 1), Ok(()));
        let more = offered | 1 << net::VIRTIO_NET_F_CSUM | 1 << 63;
        assert_eq!(shape(more, 1).fits(offered, 1), Err(ShapeError::Features("CSUM, feature 63".into())));
        assert_eq!(shape(0, 2).fits(offered, 1), Err(ShapeError::Pairs { wanted: 2, offered: 1 }));
    }

    #[test]
    fn it_is_plain_data() {
        let shape = NetShapeV1 { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, features: 1 << 32, pairs: 1 };
        let text = serde_json::to_string(&shape).unwrap();
        assert_eq!(text, r#"{"mac":[2,0,0,0,0,1],"mtu":1500,"features":4294967296,"pairs":1}"#);
        assert_eq!(serde_json::from_str::<NetShapeV1>(&text).unwrap(), shape);
    }
}
