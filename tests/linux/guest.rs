//! A guest that runs a script and says what came out.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{Ended, Running, disk_with, tranche};

/// For a boot and a short script, on an emulated KVM on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(400);

/// One guest at a time: this one's turn lasts as long as what is given.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn assets() -> PathBuf {
    PathBuf::from(std::env::var_os("TRANCHE_GUEST_DIR").expect("TRANCHE_GUEST_DIR names the guest images"))
}

/// A VM to be started: the cloud kernel on a read-only root disk, unless told otherwise.
pub struct Guest {
    pub dir: TempDir,
    pub command: Command,
    cmdline: String,
    _turn: Option<MutexGuard<'static, ()>>,
}

impl Guest {
    pub fn new(kernel: &str) -> Self {
        let assets = assets();
        Self::with(&assets.join(kernel).join("vmlinuz"), &assets.join(kernel).join("initrd"))
    }

    pub fn with(kernel: &Path, initrd: &Path) -> Self {
        Self::on_root(kernel, initrd, &format!("{},ro", assets().join("rootfs.ext4").display()))
    }

    /// A guest on a root disk of its own: `--rootfs`'s text.
    pub fn on_root(kernel: &Path, initrd: &Path, root: &str) -> Self {
        Self::on_kernel(kernel).arg("--initrd", initrd).arg("--rootfs", root)
    }

    /// A guest with nothing but a kernel: `--kernel`'s text.
    pub fn on_kernel(kernel: impl AsRef<OsStr>) -> Self {
        Self::in_turn(Some(turn()), kernel)
    }

    /// One that runs beside others, in their turn.
    pub fn beside(kernel: &str) -> Self {
        let kernel = assets().join(kernel);
        let root = format!("{},ro", assets().join("rootfs.ext4").display());
        Self::in_turn(None, kernel.join("vmlinuz")).arg("--initrd", kernel.join("initrd")).arg("--rootfs", root)
    }

    fn in_turn(turn: Option<MutexGuard<'static, ()>>, kernel: impl AsRef<OsStr>) -> Self {
        let mut command = tranche();
        command.arg("run").arg("--kernel").arg(kernel.as_ref());
        Self { dir: TempDir::new().unwrap(), command, cmdline: "quiet".into(), _turn: turn }
    }

    pub fn arg(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.arg(name).arg(value);
        self
    }

    pub fn cmdline(mut self, more: &str) -> Self {
        self.cmdline = format!("{} {more}", self.cmdline);
        self
    }

    /// Boots, and has the guest run `script` on its console; the guest powers off after it.
    pub fn start(&mut self, script: &str) -> Running {
        let disk = disk_with(self.dir.path(), "script", script.as_bytes());
        self.command.arg("--disk").arg(format!("{},ro,id=script", disk.display()));
        self.command.arg("--cmdline").arg(&self.cmdline);
        Running::start(&mut self.command)
    }

    /// Boots, runs `script`, and presses the power button while the guest is at rest: it has to power off.
    pub fn run_to_the_power_button(mut self, script: &str) -> Ended {
        let running = self.start(&format!("{script}; echo READY; sleep 600"));
        running.output.wait_for("READY", LIMIT);
        running.signal(Signal::TERM);
        running.wait(LIMIT).expect_code(0)
    }

    /// Boots, runs `script`, and waits for the end.
    pub fn run(mut self, script: &str) -> Ended {
        self.start(script).wait(LIMIT)
    }
}

/// The line that follows `key=` in a guest's output.
#[track_caller]
pub fn value<'a>(output: &'a str, key: &str) -> &'a str {
    let found = output.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("no '{key}=' in:\n{output}"))
}
