//! A user with a place for VMs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Ended, Running, guests, tranche};

/// Generous: a start takes milliseconds, a busy machine seconds.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Home {
    pub dir: TempDir,
}

impl Home {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where a VM's files are.
    pub fn vm_dir(&self, name: &str) -> PathBuf {
        self.path("state/tranche/vms").join(name)
    }

    /// What belongs to no VM: what a killed command has left.
    pub fn unfinished(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path("state/tranche/vms")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with('.')).collect()
    }

    /// `tranche` with these words.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = tranche();
        command.args(words).current_dir(self.dir.path());
        for (name, dir) in [("STATE", "state"), ("DATA", "data"), ("CACHE", "cache"), ("RUNTIME", "run")] {
            let variable = if name == "RUNTIME" { "XDG_RUNTIME_DIR".into() } else { format!("XDG_{name}_HOME") };
            command.env(variable, self.path(dir));
        }
        command
    }

    pub fn run(&self, words: &[&str]) -> Ended {
        Running::start(&mut self.command(words)).wait(LIMIT)
    }

    /// Runs a command to its good end, and returns what it printed.
    #[track_caller]
    pub fn done(&self, words: &[&str]) -> String {
        self.run(words).expect_code(0).output
    }

    /// Runs a command that has to be refused, in three lines at most that say `what`.
    #[track_caller]
    pub fn refused(&self, words: &[&str], code: i32, what: &str) -> String {
        let ended = self.run(words).expect_code(code);
        assert!(ended.errors.contains(what), "no '{what}' in:\n{}", ended.errors);
        ended.errors
    }

    /// Makes a VM of a bare-metal guest.
    #[track_caller]
    pub fn create(&self, name: &str, guest: &str, cmdline: &str, more: &[&str]) {
        let kernel = guests().join(guest);
        let words = ["create", name, "--kernel", kernel.to_str().unwrap(), "--memory", "32M", "--cmdline", cmdline];
        assert_eq!(self.done(&[&words[..], more].concat()), format!("{name}\n"));
    }

    #[track_caller]
    pub fn inspect(&self, name: &str) -> Value {
        serde_json::from_str(&self.done(&["inspect", name])).unwrap()
    }

    #[track_caller]
    pub fn state(&self, name: &str) -> String {
        self.inspect(name)["state"].as_str().unwrap().to_owned()
    }

    pub fn pid(&self, name: &str) -> i32 {
        self.inspect(name)["last-start"]["pid"].as_i64().unwrap().try_into().unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        self.done(&["ls", "-q"]).lines().map(str::to_owned).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Ok(entries) = std::fs::read_dir(self.path("state/tranche/vms")) {
            for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
                let _ = self.command(&["kill", &name]).output();
            }
        }
    }
}

/// Makes a file of zeroes.
pub fn sparse(path: &Path, bytes: u64) -> &str {
    std::fs::File::create(path).unwrap().set_len(bytes).unwrap();
    path.to_str().unwrap()
}

/// Runs a program of this machine that has to be done well.
#[track_caller]
pub fn tool(program: &str, args: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(args).env("PATH", path).output().expect(program);
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {args:?}:\n{text}");
    text
}
