//! A process that is about to become a program of the host, such as e2fsck, to work on a file that a guest has written: what
//! takes the program over finds itself with that file, the host's programs to read, and nothing to talk to.

use std::io;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ConfineError {
    #[error("the host's kernel cannot confine it: Landlock (Linux 5.13) is missing or switched off")]
    NoLandlock,
    #[error("Landlock")]
    Landlock(#[from] RulesetError),
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
}

/// What programs consist of, and what they look up about the host.
const READABLE: [&str; 8] = ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc/self", "/proc/swaps"];

/// Most address space, in bytes: what e2fsck takes for a file system of 16 TiB.
const MEMORY: u64 = 4 << 30;
/// Most time of a CPU, in seconds.
const CPU_TIME: u64 = 600;

/// Takes everything away from this process but `file`, which stays open, and what programs are made of.
///
/// # Errors
/// When the host's kernel cannot do that. What has been taken away by then is gone.
pub fn confine_to_file(file: BorrowedFd<'_>) -> Result<(), ConfineError> {
    let host = |what| move |error: rustix::io::Errno| ConfineError::Host { what, source: error.into() };
    for (resource, limit) in [(Resource::Core, 0), (Resource::As, MEMORY), (Resource::Cpu, CPU_TIME)] {
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        setrlimit(resource, limit).map_err(host("limit its resources"))?;
    }
    set_no_new_privs(true).map_err(host("keep it from new privileges"))?;
    // Of root: the file may be another user's, and is opened anew by its path below /proc/self/fd.
    let kept = rustix::thread::capabilities(None).map_err(host("look at its capabilities"))?.permitted
        & CapabilitySet::DAC_OVERRIDE;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(host("take its capabilities away"))?;
    let status = restrict(file)?;
    if status.ruleset == RulesetStatus::NotEnforced { Err(ConfineError::NoLandlock) } else { Ok(()) }
}

fn restrict(file: BorrowedFd<'_>) -> Result<landlock::RestrictionStatus, RulesetError> {
    let read = AccessFs::from_read(ABI::V1);
    let write: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rule(PathBeneath::new(file, write))?;
    for path in READABLE {
        // What this host does not have, nobody needs.
        if let Ok(path) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(path, read))?;
        }
    }
    rules.restrict_self()
}
