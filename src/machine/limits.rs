//! Limits of devices, which change while the guest runs.

use std::sync::Arc;

use super::Machine;
use super::devices::DeviceId;
use super::error::{MachineError, PlugError};
use super::parts::{OpenDisk, OpenNic};
use crate::backend::{Budget, Limiter};
use crate::config::{ConfigError, Flow, RateLimits, SavedDisk, SavedNic, Share};
use crate::devices::net::NetLimiters;
use crate::observe::Traffic;

/// What limits the devices that the owner has names for.
#[derive(Default, Clone)]
pub struct Limits {
    disks: Vec<(String, Arc<Limiter>)>,
    nics: Vec<(String, NicLimiters)>,
    budgets: Budgets,
}

/// What limits all devices of a kind together. Those of later lives of a VM go on with it.
#[derive(Debug, Default, Clone)]
pub struct Budgets {
    disks: Option<Arc<Budget>>,
    rx: Option<Arc<Budget>>,
    tx: Option<Arc<Budget>>,
}

impl From<&Share> for Budgets {
    fn from(share: &Share) -> Self {
        let budget = |flow: Option<Flow>| flow.map(|Flow(limits)| Arc::new(Budget::new(limits)));
        Self { disks: budget(share.io_limit), rx: budget(share.net_limit), tx: budget(share.net_limit) }
    }
}

/// What limits a network card.
#[derive(Clone)]
pub enum NicLimiters {
    Both(NetLimiters),
    /// Nothing can: the host's kernel moves the frames of this tap.
    Vhost(String),
}

impl Limits {
    pub fn of(disks: &[OpenDisk], nics: &[OpenNic]) -> Self {
        Self {
            disks: disks.iter().map(|disk| (disk.id().to_owned(), disk.limiter())).collect(),
            nics: nics.iter().map(|nic| (nic.id().to_owned(), nic.limiters())).collect(),
            budgets: Budgets::default(),
        }
    }

    /// Has all of them spend from budgets, also what comes later.
    ///
    /// # Errors
    /// When nothing limits one of them.
    pub fn within(mut self, budgets: Budgets) -> Result<Self, MachineError> {
        self.budgets = budgets;
        self.budgets.limit(&self)?;
        Ok(self)
    }

    /// May those of more devices be taken in?
    ///
    /// # Errors
    /// When nothing limits one of them.
    pub fn accept(&self, more: &Self) -> Result<(), MachineError> {
        self.budgets.limit(more)
    }

    /// Takes in those of more devices, which have been accepted.
    pub fn add(&mut self, mut more: Self) {
        self.disks.append(&mut more.disks);
        self.nics.append(&mut more.nics);
    }

    /// Forgets those of a device that is gone.
    pub fn forget(&mut self, device: &DeviceId) {
        match device {
            DeviceId::Disk(gone) => self.disks.retain(|(id, _)| id != gone),
            DeviceId::Nic(gone) => self.nics.retain(|(id, _)| id != gone),
            DeviceId::Entropy => {}
        }
    }

    /// Writes the limits of now into a description of the devices.
    pub fn describe(&self, disks: &mut [SavedDisk], nics: &mut [SavedNic]) {
        for (id, limiter) in &self.disks {
            disks.iter_mut().filter(|disk| disk.name == *id).for_each(|disk| disk.config.limits = limiter.limits());
        }
        for (id, limiters) in &self.nics {
            let NicLimiters::Both(limiters) = limiters else { continue };
            for nic in nics.iter_mut().filter(|nic| nic.name == *id) {
                (nic.config.rx_limits, nic.config.tx_limits) = (limiters.rx.limits(), limiters.tx.limits());
            }
        }
    }

    /// What each device has done: a disk, or a card in what the guest receives and in what it sends.
    pub fn traffic(&self) -> impl Iterator<Item = (DeviceId, Vec<&Traffic>)> {
        let disks = self.disks.iter().map(|(id, disk)| (DeviceId::Disk(id.clone()), vec![&disk.traffic]));
        let nics = self.nics.iter().filter_map(|(id, nic)| match nic {
            NicLimiters::Both(nic) => Some((DeviceId::Nic(id.clone()), vec![&nic.rx.traffic, &nic.tx.traffic])),
            // The host's kernel does not tell us.
            NicLimiters::Vhost(_) => None,
        });
        disks.chain(nics)
    }

    fn limit_disk(&self, id: &str, limits: &RateLimits) -> Result<(), MachineError> {
        let disk = self.disks.iter().find(|disk| disk.0 == id);
        let (_, limiter) = disk.ok_or_else(|| PlugError::Unknown(DeviceId::Disk(id.to_owned())))?;
        limiter.update(*limits);
        Ok(())
    }

    fn limit_nic(&self, id: &str, rx: &RateLimits, tx: &RateLimits) -> Result<(), MachineError> {
        let nic = self.nics.iter().find(|nic| nic.0 == id);
        match nic.ok_or_else(|| PlugError::Unknown(DeviceId::Nic(id.to_owned())))? {
            (_, NicLimiters::Both(limiters)) => {
                limiters.rx.update(*rx);
                limiters.tx.update(*tx);
                Ok(())
            }
            (_, NicLimiters::Vhost(_)) if rx.is_unlimited() && tx.is_unlimited() => Ok(()),
            (_, NicLimiters::Vhost(tap)) => Err(ConfigError::LimitsOfVhost(tap.clone()).into()),
        }
    }
}

impl Budgets {
    fn limit(&self, limits: &Limits) -> Result<(), MachineError> {
        let spend = |limiter: &Limiter, budget: &Option<Arc<Budget>>| {
            budget.iter().for_each(|budget| limiter.spend_from(budget.clone()));
        };
        limits.disks.iter().for_each(|(_, limiter)| spend(limiter, &self.disks));
        for (_, nic) in &limits.nics {
            match nic {
                NicLimiters::Both(limiters) => {
                    spend(&limiters.rx, &self.rx);
                    spend(&limiters.tx, &self.tx);
                }
                NicLimiters::Vhost(tap) if self.rx.is_some() => {
                    return Err(ConfigError::LimitsOfVhost(tap.clone()).into());
                }
                NicLimiters::Vhost(_) => {}
            }
        }
        Ok(())
    }
}

impl Machine {
    /// Changes the limits of a disk, at once also for what waits: a limit that is given replaces the one before, with a
    /// full bucket, or takes it away if it is none; what is absent stays as it is.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn limit_disk(&self, id: &str, limits: &RateLimits) -> Result<(), MachineError> {
        self.limits.limit_disk(id, limits)
    }

    /// The same for what a network card receives and sends.
    ///
    /// # Errors
    /// When there is no such card, or nothing can limit it.
    pub fn limit_nic(&self, id: &str, rx: &RateLimits, tx: &RateLimits) -> Result<(), MachineError> {
        self.limits.limit_nic(id, rx, tx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::OpenDirectly;
    use crate::config::TokenBucket;

    const NINE_OPS: RateLimits =
        RateLimits { bandwidth: None, operations: Some(TokenBucket { size: 9, refill_ms: 1000, burst: 0 }) };
    const NONE: RateLimits = RateLimits { bandwidth: None, operations: None };

    #[test]
    fn a_disk_is_limited_by_its_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let open = |id: &str, limits: &str| {
            let config = format!("{},ro{limits}", file.path().display()).parse().unwrap();
            OpenDisk::open(id, &config, &OpenDirectly).unwrap()
        };
        let disks = [open("a", ""), open("b", ",bandwidth=1M")];
        let mut limits = Limits::of(&disks, &[]);
        limits.add(Limits::of(&[open("c", "")], &[]));
        let before = disks[1].limiter().limits();
        limits.limit_disk("b", &NINE_OPS).unwrap();
        assert_eq!(disks[0].limiter().limits(), NONE);
        assert_eq!(disks[1].limiter().limits(), RateLimits { bandwidth: before.bandwidth, ..NINE_OPS });
        limits.limit_disk("c", &NINE_OPS).unwrap();
        limits.forget(&DeviceId::Nic("c".into()));
        limits.limit_disk("c", &NINE_OPS).unwrap();
        limits.forget(&DeviceId::Disk("c".into()));
        for unknown in ["c", "", "A"] {
            let error = limits.limit_disk(unknown, &NINE_OPS).unwrap_err();
            assert!(matches!(error, MachineError::Plug(PlugError::Unknown(DeviceId::Disk(_)))), "{error:?}");
        }
    }

    #[test]
    fn a_card_is_limited_each_way_unless_nothing_can() {
        let ours = NetLimiters::default();
        let nics = vec![("a".into(), NicLimiters::Both(ours.clone())), ("b".into(), NicLimiters::Vhost("tap0".into()))];
        let limits = Limits { nics, ..Limits::default() };
        limits.limit_nic("a", &NONE, &NINE_OPS).unwrap();
        assert_eq!((ours.rx.limits(), ours.tx.limits()), (NONE, NINE_OPS));
        limits.limit_nic("a", &NINE_OPS, &NONE).unwrap();
        assert_eq!((ours.rx.limits(), ours.tx.limits()), (NINE_OPS, NINE_OPS));
        limits.limit_nic("b", &NONE, &NONE).unwrap();
        for (rx, tx) in [(NONE, NINE_OPS), (NINE_OPS, NONE)] {
            let error = limits.limit_nic("b", &rx, &tx).unwrap_err();
            assert!(matches!(error, MachineError::Config(ConfigError::LimitsOfVhost(_))), "{error:?}");
        }
        assert!(limits.limit_nic("c", &NONE, &NONE).is_err());
        let share = |io, net| Budgets::from(&Share { io_limit: io, net_limit: net, ..Share::default() });
        let flow = || "1M".parse().ok();
        assert!(limits.clone().within(share(flow(), None)).is_ok());
        let error = limits.within(share(None, flow())).err();
        assert!(matches!(error, Some(MachineError::Config(ConfigError::LimitsOfVhost(_)))), "{error:?}");
    }
}
