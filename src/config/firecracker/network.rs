//! Network interfaces.

use serde::{Deserialize, Serialize};

use super::{InvalidValue, RateLimiter, check_id};
use crate::config::{ConfigError, MacAddress, NetBackend, NetConfig, TapNetwork};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    pub iface_id: String,
    pub host_dev_name: String,
    pub guest_mac: Option<String>,
    pub mtu: Option<u32>,
    pub rx_rate_limiter: Option<RateLimiter>,
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// A change of an interface that the guest has.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkPatch {
    pub iface_id: String,
    pub rx_rate_limiter: Option<RateLimiter>,
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterface {
    /// The card.
    pub fn nic(&self) -> Result<NetConfig, InvalidValue> {
        check_id(&self.iface_id)?;
        let mac = self.guest_mac.as_deref().map(|text| {
            text.parse::<MacAddress>().map_err(|error| match error {
                ConfigError::MulticastMac(_) => InvalidValue::MulticastMac(text.into()),
                _ => InvalidValue::Mac(text.into()),
            })
        });
        let mtu = self.mtu.map(|mtu| u16::try_from(mtu).ok().filter(|&mtu| mtu >= 68).ok_or(InvalidValue::Mtu(mtu)));
        Ok(NetConfig {
            backend: NetBackend::Tap(TapNetwork { name: self.host_dev_name.clone(), queues: 1, vhost: false }),
            mac: mac.transpose()?,
            mtu: mtu.transpose()?,
            rx_limits: RateLimiter::limits(self.rx_rate_limiter),
            tx_limits: RateLimiter::limits(self.tx_rate_limiter),
        })
    }
}

impl NetworkPatch {
    pub fn check(&self) -> Result<(), InvalidValue> {
        check_id(&self.iface_id)
    }
}
