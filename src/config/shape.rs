//! How many vCPUs and how much memory, as the command line has it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::options::{Parts, flag};
use super::{ConfigError, MemorySize};

/// vCPUs, and how many of them share a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuShape {
    pub count: u8,
    pub threads_per_core: u8,
}

/// The host's pages behind the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryPages {
    /// Small ones, and huge ones where the host has some to give just then.
    #[default]
    Transparent,
    /// Those of 2 MiB that an administrator has reserved.
    Huge,
}

/// What the host is to do with guest memory beyond holding it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct MemoryPolicy {
    /// Pages of the same content may be shared between VMs (KSM).
    pub mergeable: bool,
    /// All of it is there before the guest starts.
    pub prefault: bool,
    /// It is never swapped, and all there before the guest starts.
    pub locked: bool,
}

/// The same, and the pages it is made of, as the command line has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryPolicyArg {
    pub policy: MemoryPolicy,
    pub huge_pages: bool,
}

impl FromStr for MemoryPolicyArg {
    type Err = ConfigError;

    /// `hugepages`, `mergeable`, `prefault`, `locked`, or several of them with commas between.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut arg = Self::default();
        for word in text.split(',') {
            let flag = match word {
                "hugepages" => &mut arg.huge_pages,
                "mergeable" => &mut arg.policy.mergeable,
                "prefault" => &mut arg.policy.prefault,
                "locked" => &mut arg.policy.locked,
                _ => {
                    let takes = "hugepages, mergeable, prefault and locked";
                    return Err(ConfigError::OptionValue { key: "memory-policy", value: word.into(), takes });
                }
            };
            if std::mem::replace(flag, true) {
                return Err(ConfigError::RepeatedOption(word.into()));
            }
        }
        Ok(arg)
    }
}

/// Memory, and what pages it is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryShape {
    pub size: MemorySize,
    pub pages: MemoryPages,
}

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

impl MemoryPages {
    /// Can so much memory be made of these pages?
    ///
    /// # Errors
    /// When it cannot.
    pub fn check(self, size: MemorySize) -> Result<(), ConfigError> {
        match self {
            Self::Huge if !size.0.is_multiple_of(HUGE_PAGE) => Err(ConfigError::HugeMemoryUnit(size)),
            _ => Ok(()),
        }
    }
}

/// Can so many vCPUs be so many threads of each core?
///
/// # Errors
/// When they cannot.
pub fn check_threads(cpus: u8, threads: u8) -> Result<(), ConfigError> {
    match threads {
        1 => Ok(()),
        2 if cpus.is_multiple_of(2) => Ok(()),
        _ => Err(ConfigError::Threads { cpus, threads }),
    }
}

impl FromStr for CpuShape {
    type Err = ConfigError;

    /// `N[,threads=1|2]`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Parts { first, rest } = Parts::split(text)?;
        let number = |key, text: &str, takes| {
            text.parse().map_err(|_| ConfigError::OptionValue { key, value: text.into(), takes })
        };
        let mut shape = Self { count: number("cpus", &first, "1 to 64")?, threads_per_core: 1 };
        for (key, value) in rest {
            match key.as_str() {
                "threads" => shape.threads_per_core = number("threads", &value.unwrap_or_default(), "1 or 2")?,
                _ => return Err(ConfigError::UnknownOption { key, known: "threads" }),
            }
        }
        Ok(shape)
    }
}

impl fmt::Display for MemoryShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = match self.pages {
            MemoryPages::Transparent => "",
            MemoryPages::Huge => ",hugepages",
        };
        write!(f, "{}{pages}", self.size)
    }
}

impl FromStr for MemoryShape {
    type Err = ConfigError;

    /// `SIZE[,hugepages[=on|off]]`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Parts { first, rest } = Parts::split(text)?;
        let mut shape = Self { size: first.parse()?, pages: MemoryPages::default() };
        for (key, value) in rest {
            match key.as_str() {
                "hugepages" if flag("hugepages", value.as_deref())? => shape.pages = MemoryPages::Huge,
                "hugepages" => {}
                _ => return Err(ConfigError::UnknownOption { key, known: "hugepages" }),
            }
        }
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shapes_as_people_write_them() {
        assert_eq!("4".parse(), Ok(CpuShape { count: 4, threads_per_core: 1 }));
        assert_eq!("4,threads=2".parse(), Ok(CpuShape { count: 4, threads_per_core: 2 }));
        for text in ["", "x", "256", "-1", "4,threads", "4,threads=x", "4,cores=2", "4,threads=2,threads=2"] {
            assert!(text.parse::<CpuShape>().is_err(), "{text}");
        }
        let of = |pages| Ok(MemoryShape { size: MemorySize(1 << 30), pages });
        for (text, pages) in [
            ("1G", MemoryPages::Transparent),
            ("1G,hugepages", MemoryPages::Huge),
            ("1G,hugepages=on", MemoryPages::Huge),
            ("1G,hugepages=off", MemoryPages::Transparent),
        ] {
            assert_eq!(text.parse(), of(pages), "{text}");
        }
        for text in ["", "x", "1G,hugepages=2M", "1G,shared=on"] {
            assert!(text.parse::<MemoryShape>().is_err(), "{text}");
        }
    }

    #[test]
    fn policies_as_people_write_them() {
        let policy = MemoryPolicy { mergeable: true, locked: true, prefault: false };
        assert_eq!("mergeable,locked".parse(), Ok(MemoryPolicyArg { policy, huge_pages: false }));
        let huge = MemoryPolicyArg { huge_pages: true, ..MemoryPolicyArg::default() };
        assert_eq!("hugepages".parse(), Ok(huge));
        for text in ["", "locked,", "locked,locked", "swap"] {
            assert!(text.parse::<MemoryPolicyArg>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text: String) {
            let _ = (text.parse::<MemoryPolicyArg>(), text.parse::<CpuShape>(), text.parse::<MemoryShape>());
        }
    }
}
