//! Unpacked kernels, kept from one start to the next.
//!
//! A directory of the user's own holds three kinds of names:
//! - `<SHA-256 of the payload>-<size>`: an unpacked kernel. Complete once it has that name and that size.
//! - `seen-<device>-<inode>-<size>-<mtime>-<ctime>`: a symbolic link from a bzImage that was seen before to its
//!   unpacked kernel, so that an unchanged file is not read and hashed again.
//! - `new-<process>-<number>`: an unpacked kernel that is being written.
//!
//! A cache only ever saves time: whatever goes wrong here is a line in the debug log, and the kernel is unpacked
//! again. Any number of processes may use it at once, as names appear and vanish atomically.

use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::memory::saved::copy_data;

/// Unpacked kernels kept; the least recently used go first.
const MAX_ENTRIES: usize = 16;
/// Links from bzImages kept; the oldest go first.
const MAX_LINKS: usize = 64;
/// A file being written for longer than this is left over from a process that died.
const STALE: Duration = Duration::from_secs(3600);
/// How long a file must have been left alone before its timestamps are trusted to show the next change: more than
/// the tick of any file system's clock.
const SETTLED: Duration = Duration::from_secs(2);
/// Uses closer together than this are not told apart, which saves a write per start.
const USE_TICK: Duration = Duration::from_secs(600);

const LINK: &str = "seen-";
const UNFINISHED: &str = "new-";

/// Where unpacked kernels are kept, if anywhere. Nothing is touched before a kernel has to be unpacked.
#[derive(Clone, Default)]
pub enum KernelCache {
    /// Nothing is kept.
    #[default]
    Off,
    Dir(PathBuf),
    /// Another process has it.
    Asked(Arc<dyn UnpackedKernels>),
}

/// What a cache can be asked.
pub trait UnpackedKernels: Send + Sync {
    /// The unpacked kernel of a bzImage that has not changed since it was remembered, and its size in bytes.
    fn find_by_file(&self, bzimage: &File) -> Option<(File, u64)>;

    /// An unpacked kernel, and its size in bytes.
    fn find(&self, key: &Key) -> Option<(File, u64)>;

    /// Keeps an unpacked kernel. Tells whether that worked.
    fn insert(&self, key: &Key, unpacked: &File) -> bool;

    /// Notes which unpacked kernel belongs to a bzImage.
    fn remember(&self, bzimage: &File, key: &Key);
}

impl KernelCache {
    /// Keeps nothing.
    #[must_use]
    pub fn off() -> Self {
        Self::Off
    }

    /// The user's cache: `$XDG_CACHE_HOME/tranche/kernels`, or else `~/.cache/tranche/kernels`.
    #[must_use]
    pub fn of_user() -> Self {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        base.map_or(Self::Off, |base| Self::Dir(base.join("tranche/kernels")))
    }

    /// A cache in this directory, which is created at need.
    #[must_use]
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self::Dir(dir.into())
    }

    /// Has it look for its directory.
    #[must_use]
    pub fn open(&self) -> Option<Arc<dyn UnpackedKernels>> {
        match self {
            Self::Off => None,
            Self::Asked(other) => Some(other.clone()),
            Self::Dir(dir) => Store::open(dir)
                .inspect_err(|error| tracing::debug!(dir = %dir.display(), "unpacked kernels are not kept: {error}"))
                .map(|store| Arc::new(store) as _)
                .ok(),
        }
    }
}

/// The name of an unpacked kernel in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key(String);

impl Key {
    /// The name of what `payload` unpacks to, whose last four bytes tell the size.
    #[must_use]
    pub fn of(payload: &[u8]) -> Self {
        let size = payload.last_chunk().map_or(0, |size| u32::from_le_bytes(*size));
        let hash: String = Sha256::digest(payload).iter().map(|byte| format!("{byte:02x}")).collect();
        Self(format!("{hash}-{size}"))
    }

    /// Takes a name from the directory, where anything may be.
    fn from_name(name: &str) -> Option<Self> {
        let (hash, size) = name.split_once('-')?;
        let is_key =
            hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) && size.parse::<u32>().is_ok();
        is_key.then(|| Self(name.to_owned()))
    }

    /// The name that another process has sent, if it is one.
    #[must_use]
    pub fn checked(&self) -> Option<Self> {
        Self::from_name(&self.0)
    }

    /// Size of the unpacked kernel in bytes.
    fn size(&self) -> u64 {
        self.0.rsplit_once('-').and_then(|(_, size)| size.parse().ok()).unwrap_or(0)
    }
}

/// The open directory of a cache.
struct Store {
    dir: OwnedFd,
    owner: u32,
}

impl Store {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::open(path, flags, Mode::empty());
        let dir = open().or_else(|_| {
            DirBuilder::new().recursive(true).mode(0o700).create(path)?;
            open().map_err(io::Error::from)
        })?;
        // A directory that others may write to could hold a kernel of theirs.
        let (stat, owner) = (rustix::fs::fstat(&dir)?, rustix::process::geteuid().as_raw());
        if stat.st_uid != owner || stat.st_mode & 0o022 != 0 {
            return Err(io::Error::other("the directory is not this user's alone"));
        }
        Ok(Self { dir, owner })
    }

    fn write(&self, unfinished: &str, key: &Key, unpacked: &File) -> io::Result<()> {
        // After a crash, a process of the same number may have left one.
        self.remove(unfinished);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.dir, unfinished, flags, Mode::RUSR | Mode::WUSR)?);
        file.set_len(key.size())?;
        copy_data(unpacked, &file, 0..key.size())?;
        // Without this, a power failure could leave the right name and size with zeroes inside.
        file.sync_data()?;
        Ok(rustix::fs::renameat(&self.dir, unfinished, &self.dir, &key.0)?)
    }

    /// Notes which unpacked kernel belongs to a bzImage, unless at the time `now` the file is so new that a later
    /// change might not show.
    fn remember_at(&self, metadata: &Metadata, key: &Key, now: SystemTime) {
        let (Ok(seconds), Ok(nanoseconds)) = (metadata.ctime().try_into(), metadata.ctime_nsec().try_into()) else {
            return;
        };
        let changed = UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds));
        let age = changed.and_then(|changed| now.duration_since(changed).ok());
        if age.is_none_or(|age| age <= SETTLED) {
            return;
        }
        let link = link_name(metadata);
        // The old one may point to an entry that is gone.
        self.remove(&link);
        if let Err(error) = rustix::fs::symlinkat(&key.0, &self.dir, link) {
            tracing::debug!("a kernel is not remembered: {error}");
        }
        self.sweep();
    }

    /// Removes what is too much, and what is of no use.
    fn sweep(&self) {
        let (mut entries, mut links) = (Vec::new(), Vec::new());
        for name in self.names() {
            let Ok(stat) = rustix::fs::statat(&self.dir, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let kind = FileType::from_raw_mode(stat.st_mode);
            if name.starts_with(UNFINISHED) && is_before(modified(&stat), STALE) {
                self.remove(&name);
            } else if name.starts_with(LINK) && kind == FileType::Symlink {
                links.push((modified(&stat), name));
            } else if Key::from_name(&name).is_some() {
                entries.push((modified(&stat), name));
            }
        }
        for (list, max) in [(&mut entries, MAX_ENTRIES), (&mut links, MAX_LINKS)] {
            list.sort();
            let excess = list.len().saturating_sub(max);
            list[..excess].iter().for_each(|(_, name)| self.remove(name));
        }
    }

    fn names(&self) -> Vec<String> {
        let Ok(dir) = Dir::read_from(&self.dir) else { return Vec::new() };
        dir.flatten().filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned)).collect()
    }

    fn remove(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.dir, name, AtFlags::empty());
    }
}

impl UnpackedKernels for Store {
    fn find_by_file(&self, bzimage: &File) -> Option<(File, u64)> {
        let metadata = bzimage.metadata().ok()?;
        let target = rustix::fs::readlinkat(&self.dir, link_name(&metadata), Vec::new()).ok()?;
        self.find(&Key::from_name(target.to_str().ok()?)?)
    }

    fn find(&self, key: &Key) -> Option<(File, u64)> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::openat(&self.dir, &key.0, flags, Mode::empty()).ok()?);
        let (metadata, size) = (file.metadata().ok()?, key.size());
        if !metadata.is_file() || metadata.uid() != self.owner || metadata.len() != size {
            tracing::debug!(name = key.0, "an unpacked kernel in the cache is damaged or somebody else's");
            return None;
        }
        if !metadata.modified().is_ok_and(|used| is_within(used, USE_TICK)) {
            let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
            let keep = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
            let _ = rustix::fs::futimens(&file, &Timestamps { last_access: keep, last_modification: now });
        }
        Some((file, size))
    }

    fn insert(&self, key: &Key, unpacked: &File) -> bool {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let unfinished = format!("{UNFINISHED}{}-{number}", std::process::id());
        match self.write(&unfinished, key, unpacked) {
            Ok(()) => {
                self.sweep();
                true
            }
            Err(error) => {
                tracing::debug!("an unpacked kernel is not kept: {error}");
                self.remove(&unfinished);
                false
            }
        }
    }

    fn remember(&self, bzimage: &File, key: &Key) {
        if let Ok(metadata) = bzimage.metadata() {
            self.remember_at(&metadata, key, SystemTime::now());
        }
    }
}

/// The name under which an unchanged file is found again.
fn link_name(file: &Metadata) -> String {
    let time = |seconds: i64, nanoseconds: i64| format!("{seconds:x}.{nanoseconds:x}");
    let (mtime, ctime) = (time(file.mtime(), file.mtime_nsec()), time(file.ctime(), file.ctime_nsec()));
    format!("{LINK}{:x}-{:x}-{:x}-{mtime}-{ctime}", file.dev(), file.ino(), file.len())
}

fn modified(stat: &Stat) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0))
}

/// Whether `time` lies further back than `age`; no time of the future does.
fn is_before(time: SystemTime, age: Duration) -> bool {
    time.elapsed().is_ok_and(|elapsed| elapsed > age)
}

fn is_within(time: SystemTime, age: Duration) -> bool {
    time.elapsed().is_ok_and(|elapsed| elapsed <= age)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn kernel(content: &[u8]) -> (Key, File) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        (Key::of(&[b"packed", content, &(content.len() as u32).to_le_bytes()].concat()), file)
    }

    fn later(seconds: u64) -> SystemTime {
        SystemTime::now() + Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_kept_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("a/b")).unwrap();
        let (key, file) = kernel(b"content");
        assert!(store.find(&key).is_none());
        assert!(store.insert(&key, &file) && store.insert(&key, &file));
        let (found, size) = store.find(&key).unwrap();
        assert_eq!((io::read_to_string(found).unwrap().as_str(), size), ("content", 7));
        assert_eq!(store.names().iter().filter(|name| !name.starts_with('.')).count(), 1);
    }

    #[test]
    fn a_file_is_remembered_once_it_has_settled() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("cache")).unwrap();
        let (key, file) = kernel(b"content");
        assert!(store.insert(&key, &file));
        let path = dir.path().join("bzImage");
        std::fs::write(&path, "v1").unwrap();
        let (metadata, file) = (path.metadata().unwrap(), File::open(&path).unwrap());
        store.remember_at(&metadata, &key, later(1));
        assert!(store.find_by_file(&file).is_none());
        store.remember_at(&metadata, &key, UNIX_EPOCH);
        assert!(store.find_by_file(&file).is_none());
        store.remember_at(&metadata, &key, later(10));
        assert!(store.find_by_file(&file).is_some());
        // Another size, and another file of the same content: neither is the one that was seen.
        std::fs::write(&path, "v2+").unwrap();
        assert!(store.find_by_file(&File::open(&path).unwrap()).is_none());
        std::fs::write(dir.path().join("copy"), "v1").unwrap();
        assert!(store.find_by_file(&File::open(dir.path().join("copy")).unwrap()).is_none());
    }

    #[test]
    fn damaged_and_planted_entries_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (key, file) = kernel(b"content");
        let entry = dir.path().join(&key.0);
        for damage in ["", "conten", "content and more"] {
            std::fs::write(&entry, damage).unwrap();
            assert!(store.find(&key).is_none());
        }
        std::fs::remove_file(&entry).unwrap();
        std::fs::write(dir.path().join("elsewhere"), "content").unwrap();
        std::os::unix::fs::symlink("elsewhere", &entry).unwrap();
        assert!(store.find(&key).is_none());
        assert!(store.insert(&key, &file));
        assert!(store.find(&key).is_some());
        let metadata = dir.path().join("elsewhere").metadata().unwrap();
        std::os::unix::fs::symlink("../../etc/passwd", dir.path().join(link_name(&metadata))).unwrap();
        assert!(store.find_by_file(&File::open(dir.path().join("elsewhere")).unwrap()).is_none());
    }

    #[test]
    fn a_directory_open_to_others_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Store::open(dir.path()).is_err());
        assert!(KernelCache::in_dir(dir.path()).open().is_none());
        assert!(KernelCache::in_dir("/proc/no/such/place").open().is_none());
        assert!(KernelCache::off().open().is_none());
        let made = dir.path().join("made");
        Store::open(&made).unwrap();
        assert_eq!(made.metadata().unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut keys = Vec::new();
        for i in 0..MAX_ENTRIES as u8 + 3 {
            let (key, file) = kernel(&[i]);
            assert!(store.insert(&key, &file));
            // A little in the past, each younger than the one before; the first one is used again.
            let entry = File::options().write(true).open(dir.path().join(&key.0)).unwrap();
            entry.set_modified(later(u64::from(i)) - Duration::from_secs(3600)).unwrap();
            keys.push(key);
            assert!(store.find(&keys[0]).is_some());
        }
        std::fs::write(dir.path().join("new-1-1"), "half").unwrap();
        std::fs::write(dir.path().join("new-1-2"), "half").unwrap();
        let old = File::options().write(true).open(dir.path().join("new-1-1")).unwrap();
        old.set_modified(SystemTime::now() - 2 * STALE).unwrap();
        std::fs::write(dir.path().join("README"), "not ours").unwrap();
        store.sweep();
        let left: Vec<bool> = keys.iter().map(|key| dir.path().join(&key.0).exists()).collect();
        let expected: Vec<bool> = (0..keys.len()).map(|i| i == 0 || i > 3).collect();
        assert_eq!(left, expected);
        assert!(!dir.path().join("new-1-1").exists() && dir.path().join("new-1-2").exists());
        assert!(dir.path().join("README").exists());
    }

    #[test]
    fn many_at_once_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let content = vec![7; 300_000];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let store = Store::open(&dir.path().join("cache")).unwrap();
                    let (key, file) = kernel(&content);
                    for _ in 0..10 {
                        assert!(store.insert(&key, &file));
                        assert_eq!(io::read_to_string(store.find(&key).unwrap().0).unwrap().len(), content.len());
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path().join("cache")).unwrap().count(), 1);
    }
}
