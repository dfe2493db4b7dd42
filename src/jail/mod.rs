//! What takes rights away from processes of ours: from a VMM, whose guest may take it over, and from tools that work on what
//! a guest has written.
//!
//! ```text
//!   parent ── serve ──▶ policy ── what is allowed ──▶ the host
//!     ▲ wire: one message asks, one answers
//!   VMM: AskParent (its `HostFiles`); seccomp on every thread
//! ```

mod asking;
#[cfg(debug_assertions)]
mod attacker;
mod cgroup;
pub mod chroot;
mod enter;
mod lsm;
mod parent;
mod policy;
mod seccomp;
mod seen;
mod tool;
mod wire;

use serde::{Deserialize, Serialize};

pub use self::asking::AskParent;
#[cfg(debug_assertions)]
pub use self::attacker::attack_unjailed;
pub use self::cgroup::{Cgroup, CgroupError, can_be_made as can_make_cgroup};
pub use self::enter::{JailError, Missing, Side, examine, split};
pub use self::parent::{News, Parent};
pub use self::policy::Policy;
pub use self::seccomp::{confine as confine_thread, confine_opener, prepare_opener};
pub use self::seen::{Seen, look_at};
pub use self::tool::{ConfineError, confine_to_file, kernel_version, landlock_version};
pub use self::wire::{Ask, Given};

/// What a jail consists of, as far as a host may lack it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layer {
    Namespaces,
    EmptyRoot,
    Profile,
    Landlock,
}

impl Layer {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::EmptyRoot => "empty root directory",
            Self::Profile => "profile",
            Self::Landlock => "Landlock",
        }
    }
}
