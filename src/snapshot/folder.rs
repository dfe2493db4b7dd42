//! A snapshot's directory: written whole or not at all, and read with a critical eye.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::FlockOperation;

use super::disks::{self, DISKS, StoredFile};
use super::manifest::{self, CpuNeeds, Manifest, PartEntry};
use super::memory_digest::{digest, digest_of};
use super::{Overlay, Saved, Snapshot, SnapshotError};
use crate::backend::disk::Layer;
use crate::backend::{Deed, HostFile, HostFiles, Right};
use crate::config::{SavedDisk, SavedVm};
use crate::memory::saved::Data;
use crate::observe::rfc3339;
use crate::shelf::is_taken;

const MANIFEST: &str = "manifest.json";
/// What of a snapshot people may read and change: a [`SavedVm`].
pub const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory";

/// Most bytes of a part that is read as a whole.
const LARGEST_DOCUMENT: u64 = 64 << 20;

/// A directory that is being written. Dropping this leaves nothing behind.
pub struct NewFolder {
    host: Arc<dyn HostFiles>,
    path: PathBuf,
    /// Where it is until it is whole.
    partial: PathBuf,
    /// What is partial and not locked belongs to nobody any more.
    dir: File,
    memory: File,
    disks: Vec<StoredFile>,
    finished: bool,
}

impl NewFolder {
    /// Begins a snapshot that is to be `path`, where nothing may be yet.
    ///
    /// # Errors
    /// When there is something, or nothing can be.
    pub fn begin(path: &Path, host: &Arc<dyn HostFiles>) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::Write { path: path.to_owned(), source };
        if host.open(&HostFile::Place(path.to_owned())).is_ok() {
            return Err(SnapshotError::Exists(path.to_owned()));
        }
        if path.file_name().is_none() {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let partial = beside(path);
        remove_abandoned(&partial, &**host).map_err(failed)?;
        host.perform(&Deed::MakeDir(partial.clone())).map_err(failed)?;
        let prepare = || -> io::Result<(File, File)> {
            let lock = host.open(&HostFile::Read(partial.clone()))?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            let memory = host.open(&HostFile::New(partial.join(MEMORY)))?;
            Ok((lock, memory))
        };
        match prepare() {
            Ok((dir, memory)) => {
                let (host, path, disks) = (host.clone(), path.to_owned(), Vec::new());
                Ok(Self { host, path, partial, dir, memory, disks, finished: false })
            }
            Err(error) => {
                let _ = host.perform(&Deed::RemoveTree(partial));
                Err(failed(error))
            }
        }
    }

    /// What it takes to make a snapshot there.
    #[must_use]
    pub fn rights(path: &Path) -> Vec<Right> {
        let partial = beside(path);
        vec![
            Right::Open(HostFile::Place(path.to_owned())),
            Right::Perform(Deed::MakeDir(partial.clone())),
            Right::Perform(Deed::RemoveTree(partial.clone())),
            Right::Perform(Deed::Place { from: partial.clone(), to: path.to_owned() }),
            Right::Below(partial),
        ]
    }

    /// Where guest memory goes.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Takes in a disk, of which nobody may write to `layers` meanwhile; `disk` lies in the snapshot then.
    ///
    /// # Errors
    /// The host's.
    pub fn store(&mut self, number: usize, disk: &mut SavedDisk, layers: &[Layer]) -> Result<(), SnapshotError> {
        let stored = disks::store(&*self.host, &self.partial, number, disk, layers);
        self.disks.extend(stored.map_err(|source| SnapshotError::Write { path: self.path.clone(), source })?);
        Ok(())
    }

    /// Brings all of it to stable storage, and to its place. Takes as long as the disk does.
    ///
    /// # Errors
    /// The host's; nothing is left of it then.
    pub fn finish(mut self, saved: &Saved) -> Result<(), SnapshotError> {
        let path = self.path.clone();
        let failed = |source| SnapshotError::Write { path: path.clone(), source };
        let parts = self.write_parts(saved).map_err(failed)?;
        let (vendor, features) = saved.state.machine.cpu_needs();
        let manifest = Manifest {
            format: manifest::FORMAT.into(),
            version: manifest::VERSION,
            creator: manifest::creator(),
            created: rfc3339(SystemTime::now()),
            cpu: CpuNeeds { vendor, features },
            parts,
        };
        self.write_document(MANIFEST, &manifest).map_err(failed)?;
        self.place().map_err(|source| match is_taken(&source) {
            true => SnapshotError::Exists(self.path.clone()),
            false => SnapshotError::Write { path: self.path.clone(), source },
        })?;
        self.finished = true;
        Ok(())
    }

    fn write_parts(&mut self, saved: &Saved) -> io::Result<Vec<PartEntry>> {
        let disks = std::mem::take(&mut self.disks);
        // The disk works while the checksum is reckoned.
        let (synced, sha256) = std::thread::scope(|threads| {
            let sync = threads.spawn(|| self.memory.sync_data());
            let sha256 = digest(&self.memory);
            (sync.join().unwrap_or_else(|_| Err(io::Error::other("a panic"))), sha256)
        });
        synced?;
        let memory = PartEntry { name: MEMORY.into(), size: self.memory.metadata()?.len(), sha256: sha256? };
        let config = self.write_document(CONFIG, &saved.config)?;
        let state = self.write_document(STATE, &saved.state)?;
        let mut parts = vec![config, state, memory];
        for file in disks {
            parts.push(file.finish()?);
        }
        Ok(parts)
    }

    fn write_document(&self, name: &str, document: &impl serde::Serialize) -> io::Result<PartEntry> {
        let mut text = serde_json::to_vec_pretty(document)?;
        text.push(b'\n');
        let mut file = self.host.open(&HostFile::New(self.partial.join(name)))?;
        file.write_all(&text)?;
        file.sync_data()?;
        Ok(PartEntry { name: name.into(), size: text.len() as u64, sha256: digest_of(&text) })
    }

    fn place(&self) -> io::Result<()> {
        match self.host.open(&HostFile::Read(self.partial.join(DISKS))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            disks => disks?.sync_all()?,
        }
        self.dir.sync_all()?;
        self.host.perform(&Deed::Place { from: self.partial.clone(), to: self.path.clone() })
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.host.perform(&Deed::RemoveTree(self.partial.clone()));
        }
    }
}

/// Removes what a process has left that was killed while it wrote; not what one is writing.
fn remove_abandoned(partial: &Path, host: &dyn HostFiles) -> io::Result<()> {
    let dir = match host.open(&HostFile::Read(partial.to_owned())) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => host.perform(&Deed::RemoveTree(partial.to_owned())),
        Err(_) => Err(io::Error::other("another process is just writing a snapshot of this name")),
    }
}

/// Where something is until it is whole.
pub fn beside(path: &Path) -> PathBuf {
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(path.file_name().unwrap_or_default());
    hidden.push(".partial");
    path.with_file_name(hidden)
}

pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A snapshot, opened: its parts are there and as long as they should be, and its state is as it was written. Memory is
/// not read.
pub struct Folder {
    path: PathBuf,
    pub manifest: Manifest,
    pub snapshot: Snapshot,
}

impl Folder {
    /// # Errors
    /// What is wrong with it, and with which part.
    pub fn open(path: &Path, host: &dyn HostFiles) -> Result<Self, SnapshotError> {
        let manifest = Self::read_manifest(path, host)?;
        let state_text = read_part(path, &manifest, STATE, host)?;
        check_digest(path, &manifest, STATE, &digest_of(&state_text))?;
        let state = parse(&path.join(STATE), &state_text)?;
        // This one may be changed, also in length.
        let config = path.join(CONFIG);
        let config: SavedVm = parse(&config, &read_document(&config, host)?)?;
        check_disks(path, &manifest, &config, host)?;
        let memory_path = path.join(MEMORY);
        let memory = open(&memory_path, host).map_err(|source| missing_or(memory_path, source))?;
        check_size(path, &manifest, MEMORY, &memory)?;
        Ok(Self { path: path.to_owned(), manifest, snapshot: Snapshot { config, state, memory, overlays: Vec::new() } })
    }

    /// The snapshot with its disks in their places, and an image over each that is written to: in the directory `keep`, or
    /// in files without names, which go with the VM.
    ///
    /// # Errors
    /// What keeps us from making those.
    pub fn with_overlays(self, keep: Option<&Path>, host: &Arc<dyn HostFiles>) -> Result<Snapshot, SnapshotError> {
        let Self { path, mut snapshot, .. } = self;
        if snapshot.config.disks.iter().any(|disk| disk.stored) {
            let folder = host.canonical(&path).map_err(|source| SnapshotError::Read { path, source })?;
            for disk in snapshot.config.disks.iter_mut().filter(|disk| disk.stored) {
                disk.stored = false;
                let config = &mut disk.config;
                let behind = config.image.backing.iter_mut().map(|backing| &mut backing.path);
                std::iter::once(&mut config.path).chain(behind).for_each(|path| *path = folder.join(&path));
                if !config.read_only {
                    snapshot.overlays.push(Overlay::put_over(disk, keep, host)?);
                }
            }
        }
        Ok(snapshot)
    }

    /// What it takes to read that of a snapshot.
    ///
    /// # Errors
    /// The host's.
    pub fn manifest_right(path: &Path, host: &dyn HostFiles) -> io::Result<Right> {
        Ok(Right::Open(HostFile::Read(host.canonical(path)?.join(MANIFEST))))
    }

    /// Reads what a snapshot says of itself, and nothing else.
    ///
    /// # Errors
    /// When it is none, or of a later format.
    pub fn read_manifest(path: &Path, host: &dyn HostFiles) -> Result<Manifest, SnapshotError> {
        let text = match read_document(&path.join(MANIFEST), host) {
            Err(SnapshotError::Read { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                return Err(SnapshotError::NotASnapshot(path.to_owned()));
            }
            text => text?,
        };
        // Its version first: of a later one nothing else may be as it is here.
        #[derive(serde::Deserialize)]
        struct Version {
            format: String,
            version: u32,
        }
        let Version { format, version } = parse(&path.join(MANIFEST), &text)?;
        if format != manifest::FORMAT {
            return Err(SnapshotError::NotASnapshot(path.to_owned()));
        }
        if version != manifest::VERSION {
            return Err(SnapshotError::Version { path: path.to_owned(), version, known: manifest::VERSION });
        }
        parse(&path.join(MANIFEST), &text)
    }

    /// Bytes of memory that are not holes.
    ///
    /// # Errors
    /// The host's.
    pub fn stored_memory(&self) -> io::Result<u64> {
        let len = self.snapshot.memory.metadata()?.len();
        Data::new(&self.snapshot.memory, 0..len).map(|data| data.map(|data| data.end - data.start)).sum()
    }

    /// Reads all of it and compares it with the checksums. Returns the parts that were changed and may be.
    ///
    /// # Errors
    /// The first part that is not as it was written.
    pub fn verify(&self, host: &dyn HostFiles) -> Result<Vec<&'static str>, SnapshotError> {
        let memory_path = self.path.join(MEMORY);
        let sha256 =
            digest(&self.snapshot.memory).map_err(|source| SnapshotError::Read { path: memory_path, source })?;
        check_digest(&self.path, &self.manifest, MEMORY, &sha256)?;
        for part in self.manifest.parts.iter().filter(|part| is_of_a_disk(&part.name)) {
            let path = self.path.join(&part.name);
            let sha256 = open(&path, host).and_then(|file| digest(&file));
            let sha256 = sha256.map_err(|source| SnapshotError::Read { path, source })?;
            check_digest(&self.path, &self.manifest, &part.name, &sha256)?;
        }
        let config = read_document(&self.path.join(CONFIG), host)?;
        let changed = check_digest(&self.path, &self.manifest, CONFIG, &digest_of(&config)).is_err();
        Ok(changed.then_some(CONFIG).into_iter().collect())
    }
}

fn is_of_a_disk(name: &str) -> bool {
    name.strip_prefix(DISKS).is_some_and(|name| name.starts_with('/'))
}

/// Each disk of the snapshot has to lie in files of it, which are as long as they were.
fn check_disks(path: &Path, manifest: &Manifest, config: &SavedVm, host: &dyn HostFiles) -> Result<(), SnapshotError> {
    for disk in config.disks.iter().filter(|disk| disk.stored) {
        let behind = disk.config.image.backing.iter().map(|backing| &backing.path);
        for file in std::iter::once(&disk.config.path).chain(behind) {
            let name = file.to_str().filter(|name| is_of_a_disk(name) && manifest.part(name).is_some());
            let name = name.ok_or_else(|| SnapshotError::NotAPart {
                path: path.join(CONFIG),
                disk: disk.name.clone(),
                file: file.clone(),
            })?;
            let stored = path.join(name);
            let file = open(&stored, host).map_err(|source| missing_or(stored, source))?;
            check_size(path, manifest, name, &file)?;
        }
    }
    Ok(())
}

fn read_part(path: &Path, manifest: &Manifest, name: &str, host: &dyn HostFiles) -> Result<Vec<u8>, SnapshotError> {
    let part = path.join(name);
    let file = open(&part, host).map_err(|source| missing_or(part.clone(), source))?;
    check_size(path, manifest, name, &file)?;
    read_document(&part, host)
}

fn open(path: &Path, host: &dyn HostFiles) -> io::Result<File> {
    host.open(&HostFile::Read(path.to_owned()))
}

pub fn read_document(path: &Path, host: &dyn HostFiles) -> Result<Vec<u8>, SnapshotError> {
    let failed = |source| SnapshotError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    open(path, host).and_then(|file| file.take(LARGEST_DOCUMENT + 1).read_to_end(&mut text)).map_err(failed)?;
    if text.len() as u64 > LARGEST_DOCUMENT {
        return Err(SnapshotError::Damaged { path: path.to_owned(), what: "it is far too long".into() });
    }
    Ok(text)
}

pub fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, SnapshotError> {
    serde_json::from_slice(text).map_err(|source| SnapshotError::Syntax { path: path.to_owned(), source })
}

fn missing_or(path: PathBuf, source: io::Error) -> SnapshotError {
    match source.kind() {
        io::ErrorKind::NotFound => SnapshotError::Damaged { path, what: "it is missing".into() },
        _ => SnapshotError::Read { path, source },
    }
}

fn entry<'a>(path: &Path, manifest: &'a Manifest, name: &str) -> Result<&'a PartEntry, SnapshotError> {
    manifest.part(name).ok_or_else(|| SnapshotError::Damaged {
        path: path.join(MANIFEST),
        what: format!("it does not speak of '{name}'"),
    })
}

fn check_size(path: &Path, manifest: &Manifest, name: &str, file: &File) -> Result<(), SnapshotError> {
    let wanted = entry(path, manifest, name)?.size;
    let path = path.join(name);
    let len = file.metadata().map_err(|source| SnapshotError::Read { path: path.clone(), source })?.len();
    if len != wanted {
        let what = format!("it has {len} bytes where it had {wanted}");
        return Err(SnapshotError::Damaged { path, what });
    }
    Ok(())
}

fn check_digest(path: &Path, manifest: &Manifest, name: &str, sha256: &str) -> Result<(), SnapshotError> {
    match entry(path, manifest, name)?.sha256 == sha256 {
        true => Ok(()),
        false => Err(SnapshotError::Damaged { path: path.join(name), what: "its checksum is another".into() }),
    }
}
