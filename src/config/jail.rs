//! How a VM is jailed.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How much is taken away from a VM's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JailLevel {
    /// All of it, or the VM does not start
    #[default]
    Strict,
    /// What this host allows; what is missing is said
    Compat,
    /// Nothing: the VMM keeps all rights of its user
    Off,
}

impl fmt::Display for JailLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict",
            Self::Compat => "compat",
            Self::Off => "off",
        })
    }
}
