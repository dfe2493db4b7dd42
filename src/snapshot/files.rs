//! A snapshot in two files, as Firecracker's clients ask for it: one for the state, one for memory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folder::{beside, parent, parse, read_document};
use super::manifest;
use super::{Saved, SavedState, Snapshot, SnapshotError};
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
#[derive(Debug)]
pub struct NewFiles {
    state_path: PathBuf,
    memory_path: PathBuf,
    memory: File,
}

impl NewFiles {
    /// Begins the files, which replace what is there when they are whole.
    ///
    /// # Errors
    /// When there is no place for them.
    pub fn begin(state_path: &Path, memory_path: &Path) -> Result<Self, SnapshotError> {
        let partial = beside(memory_path);
        let memory = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&partial);
        let memory = memory.map_err(|source| SnapshotError::Write { path: memory_path.to_owned(), source })?;
        Ok(Self { state_path: state_path.to_owned(), memory_path: memory_path.to_owned(), memory })
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
        match File::open(&self.memory_path) {
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
            fs::rename(beside(&self.memory_path), &self.memory_path)?;
            fs::rename(beside(&self.state_path), &self.state_path)?;
            File::open(parent(&self.memory_path))?.sync_all()?;
            File::open(parent(&self.state_path))?.sync_all()
        });
        placed.map_err(|source| SnapshotError::Write { path: self.memory_path.clone(), source })
    }

    fn write_state(&self, document: &impl Serialize) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(beside(&self.state_path))?;
        file.write_all(&serde_json::to_vec(document)?)?;
        file.sync_all()
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        // They are not there any more if they are in their places.
        let _ = fs::remove_file(beside(&self.memory_path));
        let _ = fs::remove_file(beside(&self.state_path));
    }
}

impl Snapshot {
    /// Reads the file of a state.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read_state(path: &Path) -> Result<(SavedVm, SavedState), SnapshotError> {
        let text = read_document(path)?;
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
    pub fn open_files(state_path: &Path, memory_path: &Path) -> Result<Self, SnapshotError> {
        let (config, state) = Self::read_state(state_path)?;
        Ok(Self { config, state, memory: Self::open_memory(memory_path)?, overlays: Vec::new() })
    }

    /// Opens the file of a memory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open_memory(path: &Path) -> Result<File, SnapshotError> {
        File::open(path).map_err(|source| SnapshotError::Read { path: path.to_owned(), source })
    }
}
