//! What a card has been promised to be and told to do, as data.

use serde::{Deserialize, Serialize};

use super::shape::NetShapeV1;
use crate::virtio::{DeviceKind, OwnStateV1, StateError};

pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetStateV1 {
    pub shape: NetShapeV1,
    /// The address of now, which the driver may have changed.
    pub mac: [u8; 6],
    /// How many pairs frames are spread over.
    pub active_pairs: u16,
    /// The offloads that the driver has chosen since it negotiated them, as feature bits.
    pub chosen_offloads: Option<u64>,
    pub link_up: bool,
}

/// The shape of a card, from its saved state: it has to be made again with that.
///
/// # Errors
/// When it is not the state of a card.
pub fn saved_shape(own: &OwnStateV1) -> Result<NetShapeV1, StateError> {
    Ok(own.parse::<NetStateV1>(DeviceKind::Net, VERSION)?.shape)
}
