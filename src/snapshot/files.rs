//! A snapshot in two files, as Firecracker's clients ask for it: one for the state, one for memory.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::folder::{beside, parse, read_document};
use super::manifest;
use super::{Saved, SavedState, Snapshot, SnapshotError};
use crate::backend::{Deed, HostFile, HostFiles, OpenDirectly, Right};
use crate::config::SavedVm;
use crate::memory::saved::copy_data;

const FORMAT: &str = "tranche-snapshot-file";

/// What is in the state's file.
#[derive(Serialize, Deserialize)]
struct Document<C, S> {
    format: String,
    version: u32,
    creator: String,
    config: C,
    state: S,
}

/// Two files that are being written, beside their names. Dropping this leaves nothing behind.
pub struct NewFiles {
    host: Arc<dyn HostFiles>,
    state_path: PathBuf,
    memory_path: PathBuf,
    memory: File,
}

impl NewFiles {
    /// Begins the files, which replace what is there when they are whole.
    ///
    /// # Errors
    /// When there is no place for them.
    pub fn begin(state_path: &Path, memory_path: &Path, host: &Arc<dyn HostFiles>) -> Result<Self, SnapshotError> {
        let memory = host.open(&HostFile::Replacement(beside(memory_path)));
        let memory = memory.map_err(|source| SnapshotError::Write { path: memory_path.to_owned(), source })?;
        let (state_path, memory_path) = (state_path.to_owned(), memory_path.to_owned());
        Ok(Self { host: host.clone(), state_path, memory_path, memory })
    }

    /// What it takes to make the files, one by one.
    #[must_use]
    pub fn rights(state_path: &Path, memory_path: &Path) -> Vec<Vec<Right>> {
        [replace_state(state_path), replace_memory(memory_path)].map(file_rights).into()
    }

    /// Takes over what is in the memory's file, if it is one of so many bytes: what is written then goes over it.
    ///
    /// # Errors
    /// The host's.
    pub fn begin_with_what_is_there(&self, bytes: u64) -> Result<(), SnapshotError> {
        let take_over = |there: File| {
            if there.metadata()?.len() != bytes {
                return Ok(());
            }
            self.memory.set_len(bytes)?;
            copy_data(&there, &self.memory, 0..bytes)
        };
        match self.host.open(&HostFile::Read(self.memory_path.clone())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            there => there.and_then(take_over),
        }
        .map_err(|source| SnapshotError::Write { path: self.memory_path.clone(), source })
    }

    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Brings both to stable storage, and to their places.
    ///
    /// # Errors
    /// The host's; what was there before is there still.
    pub fn finish(self, saved: &Saved) -> Result<(), SnapshotError> {
        let document = Document {
            format: FORMAT.into(),
            version: manifest::VERSION,
            creator: manifest::creator(),
            config: &saved.config,
            state: &saved.state,
        };
        self.write_state(&document).map_err(|source| SnapshotError::Write { path: self.state_path.clone(), source })?;
        let placed = self.memory.sync_all().and_then(|()| {
            [replace_memory(&self.memory_path), replace_state(&self.state_path)]
                .iter()
                .try_for_each(|deed| self.host.perform(deed))
        });
        placed.map_err(|source| SnapshotError::Write { path: self.memory_path.clone(), source })
    }

    fn write_state(&self, document: &impl Serialize) -> io::Result<()> {
        let mut file = self.host.open(&HostFile::Replacement(beside(&self.state_path)))?;
        file.write_all(&serde_json::to_vec(document)?)?;
        file.sync_all()
    }
}

fn replace_memory(path: &Path) -> Deed {
    Deed::Replace { from: beside(path), to: path.to_owned() }
}

fn replace_state(path: &Path) -> Deed {
    Deed::ReplaceState { from: beside(path), to: path.to_owned() }
}

fn file_rights(replace: Deed) -> Vec<Right> {
    let (Deed::Replace { from, to } | Deed::ReplaceState { from, to }) = &replace else { return Vec::new() };
    vec![
        Right::Open(HostFile::Replacement(from.clone())),
        Right::Open(HostFile::Read(to.clone())),
        Right::Perform(Deed::RemoveFile(from.clone())),
        Right::Perform(replace),
    ]
}

/// Has a state's file say what it says in a new one, of which only the caller knows, once it is found to be in order.
///
/// # Errors
/// The host's, and those of `is_in_order`.
pub fn write_anew(
    path: &Path,
    config: impl FnOnce(&[u8]) -> io::Result<SavedVm>,
    is_in_order: impl FnOnce(&SavedVm) -> io::Result<()>,
) -> io::Result<()> {
    let text = read_document(path, &OpenDirectly).map_err(io::Error::other)?;
    is_in_order(&config(&text)?)?;
    std::fs::remove_file(path)?;
    let mut file = OpenDirectly.open(&HostFile::New(path.to_owned()))?;
    file.write_all(&text)?;
    file.sync_all()
}

/// What the file of a state says of the VM's configuration.
///
/// # Errors
/// When it is none.
pub fn config_of_state(text: &[u8]) -> io::Result<SavedVm> {
    Ok(serde_json::from_slice::<Document<SavedVm, serde::de::IgnoredAny>>(text)?.config)
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        // They are not there any more if they are in their places.
        for path in [&self.memory_path, &self.state_path] {
            let _ = self.host.perform(&Deed::RemoveFile(beside(path)));
        }
    }
}

impl Snapshot {
    /// Reads the file of a state.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read_state(path: &Path, host: &dyn HostFiles) -> Result<(SavedVm, SavedState), SnapshotError> {
        let text = read_document(path, host)?;
        #[derive(Deserialize)]
        struct Version {
            format: String,
            version: u32,
        }
        let Version { format, version } = parse(path, &text)?;
        if format != FORMAT {
            return Err(SnapshotError::Damaged { path: path.to_owned(), what: "it is no state of a VM".into() });
        }
        if version != manifest::VERSION {
            return Err(SnapshotError::Version { path: path.to_owned(), version, known: manifest::VERSION });
        }
        let Document { config, state, .. } = parse::<Document<SavedVm, SavedState>>(path, &text)?;
        Ok((config, state))
    }

    /// Opens a snapshot in two files.
    ///
    /// # Errors
    /// What is wrong with which of them.
    pub fn open_files(state_path: &Path, memory_path: &Path, host: &dyn HostFiles) -> Result<Self, SnapshotError> {
        let (config, state) = Self::read_state(state_path, host)?;
        Ok(Self { config, state, memory: Self::open_memory(memory_path, host)?, overlays: Vec::new() })
    }

    /// Opens the file of a memory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open_memory(path: &Path, host: &dyn HostFiles) -> Result<File, SnapshotError> {
        host.open(&HostFile::Read(path.to_owned()))
            .map_err(|source| SnapshotError::Read { path: path.to_owned(), source })
    }
}
