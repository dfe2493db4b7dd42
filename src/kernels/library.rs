//! Where imported kernels are kept, each in a directory of its name.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::KernelsError;
use crate::shelf::{Shelf, Unfinished, is_taken, user_dir};

const MANIFEST: &str = "manifest.json";
pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRD: &str = "initrd";

/// What a bundle says of itself. Newer releases read what older ones wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Of this file's format.
    pub version: u32,
    /// As `uname -r` says it in the guest.
    pub release: String,
    /// What was imported.
    pub source: PathBuf,
    /// Of the package, in hex; none for a directory.
    pub sha256: Option<String>,
    /// Seconds since 1970.
    pub imported: u64,
    /// The release of Tranche whose init is in the initrd.
    pub tranche: String,
    /// File systems that the root may be on.
    pub file_systems: Vec<String>,
    /// In the initrd.
    pub modules: Vec<String>,
    /// Asked for, and neither a module nor built into this kernel.
    pub missing: Vec<String>,
}

impl Manifest {
    pub const VERSION: u32 = 1;

    pub(super) fn now() -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}

/// An imported kernel.
#[derive(Debug, Clone)]
pub struct Bundle {
    pub name: String,
    pub manifest: Manifest,
    dir: PathBuf,
}

impl Bundle {
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(KERNEL)
    }

    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.dir.join(INITRD)
    }

    /// Bytes on the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let of = |path| fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
        of(self.kernel()) + of(self.initrd())
    }
}

/// The directory of imported kernels.
#[derive(Debug, Clone)]
pub struct Library(Shelf);

impl Library {
    #[must_use]
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self(Shelf::new(dir.into(), 0o755))
    }

    /// `$XDG_DATA_HOME/tranche/kernels`; without that variable `/var/lib/tranche/kernels` for root, and
    /// `~/.local/share/tranche/kernels` for others.
    ///
    /// # Errors
    /// When none of them can be told.
    pub fn of_user() -> Result<Self, KernelsError> {
        let base = user_dir("XDG_DATA_HOME", "/var/lib", ".local/share").ok_or(KernelsError::NoPlace)?;
        Ok(Self::in_dir(base.join("tranche/kernels")))
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> KernelsError {
        let path = self.0.dir().to_owned();
        move |source| KernelsError::Library { path, source }
    }

    /// # Errors
    /// `Unknown` if there is none of that name.
    pub fn find(&self, name: &str) -> Result<Bundle, KernelsError> {
        if !is_name(name) {
            return Err(KernelsError::Unknown(name.into()));
        }
        let dir = self.0.path(name);
        let read = fs::read(dir.join(MANIFEST)).and_then(|text| Ok(serde_json::from_slice(&text)?));
        match read {
            Ok(manifest) => Ok(Bundle { name: name.into(), manifest, dir }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                Err(KernelsError::Unknown(name.into()))
            }
            Err(source) => Err(KernelsError::Damaged { name: name.into(), source }),
        }
    }

    /// All that are whole, by name; of the others, why they are not.
    ///
    /// # Errors
    /// When the library cannot be read.
    pub fn list(&self) -> Result<Vec<Result<Bundle, KernelsError>>, KernelsError> {
        let names = self.0.names(is_name).map_err(self.failed())?;
        Ok(names.iter().map(|name| self.find(name)).collect())
    }

    /// # Errors
    /// `Unknown` if there is none of that name.
    pub fn remove(&self, name: &str) -> Result<(), KernelsError> {
        if !is_name(name) || !self.0.path(name).exists() {
            return Err(KernelsError::Unknown(name.into()));
        }
        self.0.remove(name).map_err(self.failed())
    }

    /// Begins a bundle.
    pub(super) fn begin(&self, name: &str, replace: bool) -> Result<NewBundle, KernelsError> {
        if !is_name(name) {
            return Err(KernelsError::Name(name.into()));
        }
        if !replace && self.0.path(name).exists() {
            return Err(KernelsError::Exists(name.into()));
        }
        let unfinished = self.0.begin(name).map_err(self.failed())?;
        Ok(NewBundle { library: self.clone(), name: name.into(), replace, unfinished })
    }
}

/// A bundle that is being written. Dropped before it is finished, it is gone.
pub(super) struct NewBundle {
    library: Library,
    name: String,
    replace: bool,
    unfinished: Unfinished,
}

impl NewBundle {
    pub fn dir(&self) -> &Path {
        self.unfinished.path()
    }

    /// Says of an operation on the bundle's files why it failed.
    pub fn failed(&self) -> impl FnOnce(io::Error) -> KernelsError {
        self.library.failed()
    }

    /// Gives the bundle its name, once it is on stable storage.
    pub fn finish(self, manifest: &Manifest) -> Result<Bundle, KernelsError> {
        let Self { library, name, replace, unfinished } = self;
        let named = (|| {
            fs::write(unfinished.path().join(MANIFEST), serde_json::to_vec_pretty(manifest)?)?;
            for file in [MANIFEST, KERNEL, INITRD] {
                File::open(unfinished.path().join(file))?.sync_all()?;
            }
            unfinished.finish(replace)
        })();
        let dir = library.0.path(&name);
        match named {
            Ok(()) => Ok(Bundle { name, manifest: manifest.clone(), dir }),
            Err(error) if is_taken(&error) => Err(KernelsError::Exists(name)),
            Err(error) => Err(library.failed()(error)),
        }
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    (1..=64).contains(&name.len())
        && name.bytes().all(allowed)
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            version: Manifest::VERSION,
            release: "6.1".into(),
            source: "x.deb".into(),
            sha256: None,
            imported: 0,
            tranche: "0".into(),
            file_systems: vec!["ext4".into()],
            modules: Vec::new(),
            missing: Vec::new(),
        }
    }

    fn add(library: &Library, name: &str, replace: bool, content: &str) -> Result<Bundle, KernelsError> {
        let new = library.begin(name, replace)?;
        for file in [KERNEL, INITRD] {
            fs::write(new.dir().join(file), content).unwrap();
        }
        new.finish(&manifest())
    }

    #[test]
    fn names() {
        for name in ["a", "6.1-cloud", "debian_12.x"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".new-a", "..", "a/b", "A", "-a", "ä", &"a".repeat(65)] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn a_name_is_taken_until_it_is_replaced_or_removed() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::in_dir(dir.path().join("a/b"));
        assert!(library.list().unwrap().is_empty());
        assert!(matches!(library.find("k"), Err(KernelsError::Unknown(_))));
        add(&library, "k", false, "one").unwrap();
        assert!(matches!(add(&library, "k", false, "two"), Err(KernelsError::Exists(_))));
        assert_eq!(fs::read(library.find("k").unwrap().kernel()).unwrap(), b"one");
        add(&library, "k", true, "two").unwrap();
        add(&library, "new", true, "three").unwrap();
        assert_eq!(fs::read(library.find("k").unwrap().kernel()).unwrap(), b"two");
        let found: Vec<_> = library.list().unwrap().into_iter().map(|bundle| bundle.unwrap().name).collect();
        assert_eq!(found, ["k", "new"]);
        library.remove("k").unwrap();
        assert!(matches!(library.remove("k"), Err(KernelsError::Unknown(_))));
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1, "nothing is left behind");
    }

    #[test]
    fn a_name_taken_while_a_bundle_was_written_stays_whose_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::in_dir(dir.path());
        let slow = library.begin("k", false).unwrap();
        // A second writer, which is faster: another process, so its directory has another name.
        let fast = dir.path().join("fast");
        fs::create_dir(&fast).unwrap();
        for file in [KERNEL, INITRD] {
            fs::write(fast.join(file), "fast").unwrap();
            fs::write(slow.dir().join(file), "slow").unwrap();
        }
        fs::rename(fast, dir.path().join("k")).unwrap();
        assert!(matches!(slow.finish(&manifest()), Err(KernelsError::Exists(_))));
        assert_eq!(fs::read(dir.path().join("k").join(KERNEL)).unwrap(), b"fast");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_not_finished_is_gone_and_what_was_killed_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::in_dir(dir.path());
        let killed = dir.path().join(".new-old-1");
        fs::create_dir(&killed).unwrap();
        let first = library.begin("a", false).unwrap();
        assert!(!killed.exists());
        // One that is being written stays.
        let second = library.begin("b", false).unwrap();
        assert!(first.dir().exists());
        drop((first, second));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_bundle_is_told_from_one_that_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::in_dir(dir.path());
        fs::create_dir(dir.path().join("k")).unwrap();
        assert!(matches!(library.find("k"), Err(KernelsError::Damaged { .. })));
        fs::write(dir.path().join("k").join(MANIFEST), "{\"version\": 1").unwrap();
        assert!(matches!(library.find("k"), Err(KernelsError::Damaged { .. })));
        library.remove("k").unwrap();
    }
}
