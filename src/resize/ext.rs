//! e2fsprogs at work on a file system that a guest has written: confined to its file.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use super::ResizeError;
use super::gpt::SECTOR;

/// What this program is called with to become another, confined to the file that is its standard input.
pub const CONFINED: &str = "confined-tool";

const PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// e2fsck and resize2fs of this host.
#[derive(Debug, Clone)]
pub struct Tools {
    check: PathBuf,
    resize: PathBuf,
}

impl Tools {
    /// Those there are.
    #[must_use]
    pub fn find() -> Option<Self> {
        let find = |name: &str| PLACES.iter().map(|place| Path::new(place).join(name)).find(|path| path.exists());
        Some(Self { check: find("e2fsck")?, resize: find("resize2fs")? })
    }

    /// Checks a file system, and mends what can be mended without asking anybody.
    ///
    /// # Errors
    /// When it is damaged beyond that.
    pub fn check(&self, disk: &File, offset: u64) -> Result<(), ResizeError> {
        let said = confined(&self.check, &["-f", "-p", &target(offset)], disk)?;
        // 1: what was wrong is mended; 2: so that a kernel that has it mounted should start anew.
        match said.status.code() {
            Some(0..=2) => Ok(()),
            _ => Err(failed("e2fsck", &said)),
        }
    }

    /// Mends a file system that was good until somebody who moved it was killed.
    ///
    /// # Errors
    /// When that cannot be done.
    pub fn mend(&self, disk: &File, offset: u64) -> Result<(), ResizeError> {
        let said = confined(&self.check, &["-f", "-y", &target(offset)], disk)?;
        match said.status.code() {
            Some(0..=2) => Ok(()),
            _ => Err(failed("e2fsck", &said)),
        }
    }

    /// The least bytes that it can be made of.
    ///
    /// # Errors
    /// When resize2fs does not tell.
    pub fn minimum(&self, disk: &File, offset: u64, block_size: u64) -> Result<u64, ResizeError> {
        let said = confined(&self.resize, &["-P", &target(offset)], disk)?;
        let blocks: Option<u64> = said.text.lines().find_map(|line| line.rsplit_once(": ")?.1.trim().parse().ok());
        blocks
            .filter(|_| said.status.success())
            .map(|blocks| blocks.saturating_mul(block_size))
            .ok_or_else(|| failed("resize2fs", &said))
    }

    /// Makes it `bytes` large.
    ///
    /// # Errors
    /// When resize2fs refuses.
    pub fn resize(&self, disk: &File, offset: u64, bytes: u64) -> Result<(), ResizeError> {
        let size = format!("{}s", bytes / SECTOR);
        let said = confined(&self.resize, &[&target(offset), &size], disk)?;
        if said.status.success() { Ok(()) } else { Err(failed("resize2fs", &said)) }
    }
}

/// The standard input, from a byte on.
fn target(offset: u64) -> String {
    format!("/proc/self/fd/0?offset={offset}")
}

fn failed(tool: &'static str, said: &Said) -> ResizeError {
    let lines = said.text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    let how = match (said.status.code(), said.status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    };
    let said = lines.replace("/proc/self/fd/0", "the disk").replace(char::is_control, "?");
    ResizeError::Tool { tool, how, said: said.chars().take(500).collect() }
}

/// How a tool ended, and what it said before.
struct Said {
    status: ExitStatus,
    text: String,
}

/// A guest may have a tool say more than anybody wants to know; it does not get that far.
const MOST_SAID: u64 = 64 << 10;

fn confined(tool: &Path, args: &[&str], disk: &File) -> Result<Said, ResizeError> {
    let run = || {
        let (reader, writer) = io::pipe()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg0("tranche").arg(CONFINED).arg(tool).args(args);
        command.env_clear().env("LC_ALL", "C").current_dir("/");
        // Whoever kills us, or interrupts us on a terminal, has it come to its end.
        command.process_group(0);
        command.stdin(disk.try_clone()?).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn()?;
        // With our copies of its end, which would keep us waiting.
        drop(command);
        let mut text = Vec::new();
        reader.take(MOST_SAID).read_to_end(&mut text)?;
        Ok(Said { status: child.wait()?, text: String::from_utf8_lossy(&text).into_owned() })
    };
    run().map_err(|source| ResizeError::Start { path: tool.to_owned(), source })
}
