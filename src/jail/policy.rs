//! What a parent gives to its VMM.
//!
//! Until the guest runs, nothing of the guest's can have moved the VMM: it gets what it asks for, which is what its user
//! has named, on the command line, in a file given there or through the API. From then on it gets the same again, and
//! what a client of the API names in a request, which the parent reads for itself. Nothing that the VMM says gives it more; it
//! says what it has no use for any more, and does not get that again.

use std::io;
use std::path::{Component, Path};

use crate::backend::{Deed, HostFile, HostFiles, OpenDirectly, Right};
use crate::config::{NetBackend, SavedDisk, SavedNic, SavedVm};
use crate::control::{Call, Drives};

/// Groups of rights that clients have given; the oldest go first.
const MOST_GROUPS: usize = 256;

#[derive(Debug, Default)]
pub struct Policy {
    is_frozen: bool,
    /// What was asked for before the guest ran.
    known: Vec<Right>,
    /// What clients have named since, request by request.
    named: Vec<Vec<Right>>,
    /// Those of the start, and those that clients have named since.
    drives: Drives,
}

impl Policy {
    /// One that knows some rights already.
    #[must_use]
    pub fn knowing(known: Vec<Right>) -> Self {
        Self { known: known.into_iter().map(absolute).collect(), ..Self::default() }
    }

    /// The guest is about to run, with these drives.
    pub fn freeze(&mut self, drives: Drives) {
        self.is_frozen = true;
        self.drives = drives;
    }

    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.is_frozen
    }

    /// A client asks for something, and has named by that what it takes.
    pub fn hear(&mut self, call: &Call) {
        call.named(&self.drives).into_iter().for_each(|rights| self.name(rights));
        match call {
            // Of two of the same id, the first one is there already.
            Call::PutDrive(drive) if self.drives.len() < MOST_GROUPS => {
                self.drives.entry(drive.drive_id.clone()).or_insert(drive.is_read_only.unwrap_or(false));
            }
            Call::DeleteDrive(id) => drop(self.drives.remove(id)),
            _ => {}
        }
    }

    fn name(&mut self, rights: Vec<Right>) {
        let rights: Vec<_> = rights.into_iter().map(absolute).collect();
        if rights.is_empty() || self.named.contains(&rights) {
            return;
        }
        if self.named.len() == MOST_GROUPS {
            self.named.remove(0);
        }
        self.named.push(rights);
    }

    /// All that it has.
    fn rights(&self) -> impl Iterator<Item = &Right> {
        self.known.iter().chain(self.named.iter().flatten())
    }

    /// May the VMM have this?
    pub fn allows(&mut self, wanted: Right) -> bool {
        let wanted = absolute(wanted);
        let is_known = self.rights().any(|right| covers(right, &wanted));
        if !is_known && !self.is_frozen {
            self.known.push(wanted);
            return true;
        }
        is_known
    }

    /// The VM has no use for something any more: it is to be named anew before it can be had again.
    pub fn let_go(&mut self, right: &Right) {
        let right = &absolute(right.clone());
        let stays = |known: &Right| !covers(known, right) && !covers(right, known);
        self.known.retain(stays);
        self.named.iter_mut().for_each(|rights| rights.retain(stays));
        self.named.retain(|rights| !rights.is_empty());
    }

    /// Something has been done. What was there to do this once is gone with it.
    pub fn done(&mut self, deed: &Deed) {
        if matches!(deed, Deed::Place { .. } | Deed::Replace { .. } | Deed::ReplaceState { .. }) {
            let done = absolute(Right::Perform(deed.clone()));
            self.named.retain(|rights| !rights.contains(&done));
        }
    }

    /// Does a VM that is saved have nothing that this one has not had? Whoever restores it trusts what it says.
    ///
    /// # Errors
    /// What it says that nobody has named.
    pub fn check_saved(&self, saved: &SavedVm) -> io::Result<()> {
        let refuse =
            |what: String| Err(io::Error::other(format!("a snapshot cannot have {what}, which this VM has not")));
        for SavedDisk { config, .. } in saved.disks.iter().filter(|disk| !disk.stored) {
            let behind = config.image.backing.iter().map(|backing| (&backing.path, true));
            for (path, read_only) in std::iter::once((&config.path, config.read_only)).chain(behind) {
                if !self.has_file(path, read_only) {
                    return refuse(path.display().to_string());
                }
            }
        }
        for SavedNic { config, .. } in &saved.nics {
            let (right, what) = match &config.backend {
                NetBackend::Tap(tap) => (Right::JoinTap(tap.name.clone()), format!("the tap '{}'", tap.name)),
                NetBackend::User(network) => (Right::StartPasst(network.clone()), "that user network".into()),
            };
            let is_vhost = matches!(&config.backend, NetBackend::Tap(tap) if tap.vhost);
            if !self.has(&right) || is_vhost && !self.has(&Right::Open(HostFile::VhostNet)) {
                return refuse(what);
            }
        }
        Ok(())
    }

    fn has(&self, wanted: &Right) -> bool {
        self.rights().any(|right| right == wanted)
    }

    /// Has it a file, and to write to if need be?
    fn has_file(&self, path: &Path, read_only: bool) -> bool {
        self.rights().any(|right| match right {
            Right::Open(HostFile::Disk { path: known, read_only: is_read }) => known == path && (read_only || !is_read),
            // An image that was made for this VM.
            Right::Open(HostFile::New(known)) => known == path,
            Right::Open(HostFile::Read(known)) => known == path && read_only,
            _ => false,
        })
    }
}

/// A right with paths that do not depend on where they are looked for: the VMM, its user and clients each have a way to
/// say the same. All of theirs begin in the directory of this process.
fn absolute(mut right: Right) -> Right {
    right.paths_mut().into_iter().for_each(|path| *path = OpenDirectly.absolute(path));
    right
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
        policy.freeze(Drives::new());
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
        policy.freeze(Drives::new());
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
    fn a_drive_that_is_only_read_gets_no_file_to_write_to() {
        let mut policy = Policy::default();
        policy.freeze(Drives::from([("base".into(), true), ("data".into(), false)]));
        let patch = |id: &str, path: &str| {
            let drive = serde_json::json!({"drive_id": id, "path_on_host": path});
            Call::PatchDrive(serde_json::from_value(drive).unwrap())
        };
        policy.hear(&patch("base", "/b"));
        policy.hear(&patch("data", "/d"));
        assert!(
            policy.allows(disk("/b", true)) && !policy.allows(disk("/b", false)) && policy.allows(disk("/d", false))
        );
        // One that is refused, as there is such a drive, does not change that.
        let put = |id: &str, path: &str, read_only: bool| {
            let drive = serde_json::json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": read_only});
            Call::PutDrive(serde_json::from_value(drive).unwrap())
        };
        policy.hear(&put("base", "/x", false));
        policy.hear(&patch("base", "/c"));
        assert!(policy.allows(disk("/c", true)) && !policy.allows(disk("/c", false)));
        policy.hear(&put("new", "/n", true));
        policy.hear(&patch("new", "/o"));
        assert!(
            policy.allows(disk("/n", true)) && policy.allows(disk("/o", true)) && !policy.allows(disk("/o", false))
        );
    }

    #[test]
    fn what_is_let_go_of_has_to_be_named_anew() {
        let mut policy = Policy::default();
        assert!(policy.allows(disk("/d", false)) && policy.allows(Right::JoinTap("t".into())));
        policy.freeze(Drives::new());
        policy.name(vec![disk("/e", true)]);
        for gone in [disk("/d", false), disk("/e", false), Right::JoinTap("t".into())] {
            policy.let_go(&gone);
        }
        for refused in [disk("/d", false), disk("/d", true), disk("/e", true), Right::JoinTap("t".into())] {
            assert!(!policy.allows(refused.clone()), "{refused:?}");
        }
        policy.name(vec![disk("/d", true)]);
        assert!(policy.allows(disk("/d", true)) && !policy.allows(disk("/d", false)));
    }

    #[test]
    fn clients_do_not_make_it_grow_without_bound() {
        let mut policy = Policy::default();
        policy.freeze(Drives::new());
        for number in 0..2 * MOST_GROUPS {
            policy.name(vec![Right::Link(PathBuf::from(format!("/{number}")))]);
        }
        assert_eq!(policy.named.len(), MOST_GROUPS);
        assert!(!policy.allows(Right::Link("/0".into())));
    }
}
