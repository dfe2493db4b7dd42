//! How much of the host a VM may take.

use std::fmt;
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::options::Parts;
use super::{ConfigError, MemorySize, RateLimits, TokenBucket};

/// Limits of a whole VM, of whatever it consists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct Share {
    /// CPU time that the VM may take, with all its threads: 1.5 is one and a half CPUs of the host. Needs a cgroup (see docs/shares.md)
    #[arg(long, value_name = "CPUS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<CpuLimit>,

    /// Its part of CPU time where VMs want more than there is, 1 to 10000; others have 100. Needs a cgroup
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u16>,

    /// Memory of the host that the VM may take, with all that is needed besides its guest's; past it the kernel ends the VM. Needs a cgroup
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<MemorySize>,

    /// What its disks together may do, besides their own limits
    #[arg(long, value_name = "BYTES[/MS][+BURST][,ops=N[/MS][+BURST]]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_limit: Option<Flow>,

    /// What its network cards together may receive, and as much that they may send, besides their own limits; not with vhost
    #[arg(long, value_name = "BYTES[/MS][+BURST][,ops=N[/MS][+BURST]]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_limit: Option<Flow>,
}

impl Share {
    /// Are there no limits?
    #[must_use]
    pub fn is_whole(&self) -> bool {
        *self == Self::default()
    }

    /// # Errors
    /// When a number in a file is none that the command line would take.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self.cpu_weight {
            Some(weight @ (0 | 10_001..)) => {
                Err(ConfigError::OptionValue { key: "cpu-weight", value: weight.to_string(), takes: "1 to 10000" })
            }
            _ => Ok(()),
        }
    }

    /// With limits of another one where this has none.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self {
            cpu_limit: self.cpu_limit.or(other.cpu_limit),
            cpu_weight: self.cpu_weight.or(other.cpu_weight),
            memory_limit: self.memory_limit.or(other.memory_limit),
            io_limit: self.io_limit.or(other.io_limit),
            net_limit: self.net_limit.or(other.net_limit),
        }
    }

    /// Is there a limit that only the host's kernel can keep?
    #[must_use]
    pub fn needs_cgroup(&self) -> bool {
        self.cpu_limit.is_some() || self.cpu_weight.is_some() || self.memory_limit.is_some()
    }

    /// The options that say it.
    #[must_use]
    pub fn to_options(&self) -> Vec<String> {
        let Self { cpu_limit, cpu_weight, memory_limit, io_limit, net_limit } = self;
        let options = [
            cpu_limit.map(|limit| format!("--cpu-limit={limit}")),
            cpu_weight.map(|weight| format!("--cpu-weight={weight}")),
            memory_limit.map(|limit| format!("--memory-limit={limit}")),
            io_limit.map(|limit| format!("--io-limit={limit}")),
            net_limit.map(|limit| format!("--net-limit={limit}")),
        ];
        options.into_iter().flatten().collect()
    }
}

/// CPU time for each time that passes, in thousandths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuLimit(u32);

impl CpuLimit {
    /// What the kernel takes for the least of a tenth of a second is one of its milliseconds.
    const LEAST: u32 = 10;

    /// Microseconds of CPU time in so many microseconds.
    #[must_use]
    pub fn quota(self, period: u64) -> u64 {
        period * u64::from(self.0) / 1000
    }
}

impl FromStr for CpuLimit {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let takes = "a number of CPUs from 0.01 to 10000, with up to three decimals, such as 1.5";
        let parse = || {
            let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
            let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if !digits(whole) || !digits(part) || part.len() > 3 {
                return None;
            }
            let thousandths: u32 = format!("{part:0<3}").parse().ok()?;
            let limit = whole.parse::<u32>().ok()?.checked_mul(1000)?.checked_add(thousandths)?;
            (Self::LEAST..=10_000_000).contains(&limit).then_some(Self(limit))
        };
        parse().ok_or_else(|| ConfigError::OptionValue { key: "cpu-limit", value: text.into(), takes })
    }
}

impl fmt::Display for CpuLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// Limits of what flows through devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Flow(pub RateLimits);

impl FromStr for Flow {
    type Err = ConfigError;

    /// `BYTES[/MS][+BURST][,ops=N[/MS][+BURST]]`, or the operations alone
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Parts { first, mut rest } = Parts::split(text)?;
        let mut limits = RateLimits::default();
        match first.split_once('=') {
            Some((key, value)) => rest.insert(0, (key.to_owned(), Some(value.to_owned()))),
            None => limits.bandwidth = Some(TokenBucket::of_bytes("bandwidth", &first)?),
        }
        for (key, value) in rest {
            let value = value.unwrap_or_default();
            let (limit, read) = match key.as_str() {
                "bandwidth" => (&mut limits.bandwidth, TokenBucket::of_bytes("bandwidth", &value)?),
                "ops" => (&mut limits.operations, TokenBucket::of_operations("ops", &value)?),
                _ => return Err(ConfigError::UnknownOption { key, known: "bandwidth and ops" }),
            };
            if limit.replace(read).is_some() {
                return Err(ConfigError::RepeatedOption(key));
            }
        }
        Ok(Self(limits))
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bucket = |TokenBucket { size, refill_ms, burst }| format!("{size}/{refill_ms}+{burst}");
        let bandwidth = self.0.bandwidth.map(|limit| format!("bandwidth={}", bucket(limit)));
        let operations = self.0.operations.map(|limit| format!("ops={}", bucket(limit)));
        f.write_str(&bandwidth.into_iter().chain(operations).collect::<Vec<_>>().join(","))
    }
}

macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl TryFrom<String> for $type {
            type Error = ConfigError;

            fn try_from(text: String) -> Result<Self, ConfigError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    )*};
}

as_text!(CpuLimit, Flow);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cpus_as_people_write_them() {
        for (text, thousandths) in [("1", 1000), ("1.5", 1500), ("0.01", 10), ("2.125", 2125), ("64.0", 64_000)] {
            assert_eq!(text.parse(), Ok(CpuLimit(thousandths)), "{text}");
        }
        for text in ["", "0", "0.009", ".5", "1.", "1.2345", "-1", "+1", "1e3", "1,5", "50%", "10001", "4294967296"] {
            assert!(text.parse::<CpuLimit>().is_err(), "{text}");
        }
        assert_eq!(CpuLimit(1500).quota(100_000), 150_000);
        assert_eq!(CpuLimit(10).quota(100_000), 1000);
    }

    #[test]
    fn flows_as_people_write_them() {
        let bucket = |size, refill_ms, burst| Some(TokenBucket { size, refill_ms, burst });
        for (text, bandwidth, operations) in [
            ("50M", bucket(50 << 20, 1000, 0), None),
            ("1M/100+2M,ops=9", bucket(1 << 20, 100, 2 << 20), bucket(9, 1000, 0)),
            ("ops=9", None, bucket(9, 1000, 0)),
            ("bandwidth=1K,ops=9", bucket(1024, 1000, 0), bucket(9, 1000, 0)),
        ] {
            assert_eq!(text.parse(), Ok(Flow(RateLimits { bandwidth, operations })), "{text}");
        }
        for text in ["", "0", "1M,", "1M,ops", "1M,ops=0", "1M,bandwidth=2M", "ops=1,ops=2", "1M,2M", "rate=1"] {
            assert!(text.parse::<Flow>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_share_is_said_in_options_and_in_files() {
        let share = Share {
            cpu_limit: "0.5".parse().ok(),
            cpu_weight: Some(50),
            memory_limit: Some(MemorySize(1 << 30)),
            io_limit: "1M,ops=9".parse().ok(),
            net_limit: "ops=7".parse().ok(),
        };
        let options = share.to_options();
        assert_eq!(options[..3], ["--cpu-limit=0.5", "--cpu-weight=50", "--memory-limit=1G"]);
        assert_eq!(options[3..], ["--io-limit=bandwidth=1048576/1000+0,ops=9/1000+0", "--net-limit=ops=7/1000+0"]);
        let text = serde_json::to_string(&share).unwrap();
        assert_eq!(serde_json::from_str::<Share>(&text).unwrap(), share);
        assert_eq!(serde_json::to_string(&Share::default()).unwrap(), "{}");
        assert!(Share::default().to_options().is_empty() && !Share::default().needs_cgroup());
        assert!(serde_json::from_str::<Share>(r#"{"cpu-limit": "x"}"#).is_err());
        let weight = |weight| Share { cpu_weight: Some(weight), ..Share::default() }.validate();
        assert!(weight(1).is_ok() && weight(10_000).is_ok() && weight(0).is_err() && weight(10_001).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(text: String) {
            let _ = (text.parse::<CpuLimit>(), text.parse::<Flow>());
        }

        #[test]
        fn what_is_shown_is_meant(limit in 10u32..=10_000_000, size in 1u64.., refill_ms in 1u64.., burst: u64) {
            let cpus = CpuLimit(limit);
            prop_assert_eq!(cpus.to_string().parse(), Ok(cpus));
            let bucket = Some(TokenBucket { size, refill_ms, burst });
            let flow = Flow(RateLimits { bandwidth: bucket, operations: bucket });
            prop_assert_eq!(flow.to_string().parse(), Ok(flow));
        }
    }
}
