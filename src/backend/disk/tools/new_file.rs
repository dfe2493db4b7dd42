//! A file that appears under its name when it is whole, or never.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD};

use super::ToolError;
use crate::backend::OpenDirectly;
use crate::backend::disk::file::DiskFile;

pub struct NewFile {
    pub file: File,
    path: PathBuf,
    force: bool,
    /// Its name until it is whole, on file systems that have no files without a name.
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Starts a file that is to be `path`, which must not be there unless `force` is given, and must not be in
    /// use then.
    pub fn start(path: &Path, force: bool) -> Result<Self, ToolError> {
        let write = |source| ToolError::Write { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(_) if !force => return Err(ToolError::Exists { path: path.to_owned() }),
            // Opening it takes the lock; a VM that has it keeps us from replacing it. Only files are replaced.
            Ok(_) => {
                let old = DiskFile::open(&OpenDirectly, path, false)?;
                if !old.file.metadata().map_err(write)?.is_file() {
                    return Err(ToolError::BlockDevice { path: path.to_owned() });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(write(error)),
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let nameless = options.clone().custom_flags(libc::O_TMPFILE).open(directory(path));
        let (file, temporary) = match nameless {
            Ok(file) => (file, None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
                let name = beside(path);
                (options.create_new(true).open(&name).map_err(write)?, Some(name))
            }
            Err(error) => return Err(write(error)),
        };
        Ok(Self { file, path: path.to_owned(), force, temporary })
    }

    /// Puts it onto stable storage, and into its place.
    pub fn finish(mut self) -> Result<(), ToolError> {
        self.place().map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => ToolError::Exists { path: self.path.clone() },
            _ => ToolError::Write { path: self.path.clone(), source },
        })
    }

    fn place(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        // A link does not replace what is there; for that, the file needs a name to be renamed from.
        if self.temporary.is_none() {
            let name = if self.force { beside(&self.path) } else { self.path.clone() };
            let nameless = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            rustix::fs::linkat(CWD, nameless, CWD, &name, AtFlags::SYMLINK_FOLLOW)?;
            self.temporary = self.force.then_some(name);
        }
        if let Some(name) = &self.temporary {
            match self.force {
                true => fs::rename(name, &self.path)?,
                false => rustix::fs::renameat_with(CWD, name, CWD, &self.path, rustix::fs::RenameFlags::NOREPLACE)?,
            }
            self.temporary = None;
        }
        File::open(directory(&self.path))?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            let _ = fs::remove_file(name);
        }
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A name in the same directory that nobody else uses.
fn beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.new", std::process::id()));
    path.with_file_name(name)
}
