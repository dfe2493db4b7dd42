//! What a parent gives to its VMM.
//!
//! Until the guest runs, nothing of the guest's can have moved the VMM: it gets what it asks for, which is what its user
//! has named, on the command line, in a file given there or through the API. From then on it gets the same again, and
//! what a client of the API names in a request, which the parent reads for itself. Nothing that the VMM says changes that.

use std::path::{Component, Path};

use crate::backend::{Deed, HostFile, Right};

/// Groups of rights that clients have given; the oldest go first.
const MOST_GROUPS: usize = 256;

#[derive(Debug, Default)]
pub struct Policy {
    is_frozen: bool,
    /// What was asked for before the guest ran.
    known: Vec<Right>,
    /// What clients have named since, request by request.
    named: Vec<Vec<Right>>,
}

impl Policy {
    /// One that knows some rights already.
    #[must_use]
    pub fn knowing(known: Vec<Right>) -> Self {
        Self { known, ..Self::default() }
    }

    /// The guest is about to run.
    pub fn freeze(&mut self) {
        self.is_frozen = true;
    }

    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.is_frozen
    }

    /// A client has named something.
    pub fn name(&mut self, rights: Vec<Right>) {
        if rights.is_empty() || self.named.contains(&rights) {
            return;
        }
        if self.named.len() == MOST_GROUPS {
            self.named.remove(0);
        }
        self.named.push(rights);
    }

    /// May the VMM have this?
    pub fn allows(&mut self, wanted: Right) -> bool {
        let mut rights = self.known.iter().chain(self.named.iter().flatten());
        let is_known = rights.any(|right| covers(right, &wanted));
        if !is_known && !self.is_frozen {
            self.known.push(wanted);
            return true;
        }
        is_known
    }

    /// Something has been done. What was there to do this once is gone with it.
    pub fn done(&mut self, deed: &Deed) {
        if matches!(deed, Deed::Place { .. } | Deed::Replace { .. }) {
            self.named.retain(|rights| !rights.contains(&Right::Perform(deed.clone())));
        }
    }
}

/// Does who has a right have the other one too?
fn covers(right: &Right, wanted: &Right) -> bool {
    match (right, wanted) {
        (Right::Open(HostFile::Disk { path, read_only: false }), Right::Open(HostFile::Disk { path: other, .. })) => {
            path == other
        }
        (Right::Below(dir), Right::Open(HostFile::Read(path)) | Right::Perform(Deed::MakeDir(path))) if path == dir => {
            true
        }
        (
            Right::Below(dir),
            Right::Open(HostFile::New(path) | HostFile::Read(path))
            | Right::Perform(Deed::MakeDir(path) | Deed::MakeReadOnly(path))
            | Right::Link(path),
        ) => is_below(path, dir),
        // Whoever listens takes the socket away in the end.
        (Right::Listen(path), Right::Perform(Deed::RemoveFile(other))) => path == other,
        _ => right == wanted,
    }
}

/// Is a path one of a name in a directory, or below it, without a way out of there?
fn is_below(path: &Path, dir: &Path) -> bool {
    let Ok(rest) = path.strip_prefix(dir) else { return false };
    rest.components().count() > 0 && rest.components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn disk(path: &str, read_only: bool) -> Right {
        Right::Open(HostFile::Disk { path: path.into(), read_only })
    }

    fn new(path: &str) -> Right {
        Right::Open(HostFile::New(path.into()))
    }

    #[test]
    fn what_was_asked_for_before_the_guest_ran_is_to_be_had_again_and_nothing_else() {
        let mut policy = Policy::default();
        assert!(policy.allows(disk("/d", false)) && policy.allows(disk("/r", true)));
        policy.freeze();
        assert!(policy.allows(disk("/d", false)) && policy.allows(disk("/d", true)) && policy.allows(disk("/r", true)));
        for refused in [disk("/r", false), disk("/e", true), new("/d"), Right::Open(HostFile::Read("/d".into()))] {
            assert!(!policy.allows(refused.clone()), "{refused:?}");
            // Asking does not help.
            assert!(!policy.allows(refused));
        }
    }

    #[test]
    fn a_directory_that_a_client_names_is_written_once_and_is_no_way_out() {
        let mut policy = Policy::default();
        policy.freeze();
        let place = Deed::Place { from: "/s/.a".into(), to: "/s/a".into() };
        policy.name(vec![Right::Below("/s/.a".into()), Right::Perform(place.clone())]);
        assert!(policy.allows(new("/s/.a/memory")) && policy.allows(new("/s/.a/disks/0")));
        for refused in ["/s/.a/../b", "/s/.a/disks/../../b", "/s/b", "/s/.a", "/s/.ab/c", "/s/.a/./.."] {
            assert!(!policy.allows(new(refused)), "{refused}");
        }
        assert!(!policy.allows(Right::Open(HostFile::Replacement("/s/.a/memory".into()))));
        assert!(policy.allows(Right::Perform(place.clone())));
        policy.done(&place);
        assert!(!policy.allows(new("/s/.a/memory")) && !policy.allows(Right::Perform(place)));
    }

    #[test]
    fn clients_do_not_make_it_grow_without_bound() {
        let mut policy = Policy::default();
        policy.freeze();
        for number in 0..2 * MOST_GROUPS {
            policy.name(vec![Right::Link(PathBuf::from(format!("/{number}")))]);
        }
        assert_eq!(policy.named.len(), MOST_GROUPS);
        assert!(!policy.allows(Right::Link("/0".into())));
    }
}
