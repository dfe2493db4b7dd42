//! A start that has to fail, and what it may say and leave behind.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::{Running, guests, not_tested, tranche};

pub const LIMIT: Duration = Duration::from_secs(60);

/// `tranche run` with a kernel that boots anywhere.
pub fn run() -> Command {
    run_kernel(guests().join("hello"))
}

/// `tranche run` with another file as its kernel.
pub fn run_kernel(path: impl AsRef<OsStr>) -> Command {
    let mut command = tranche();
    // Not the user's own cache of unpacked kernels.
    command.env("XDG_CACHE_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"));
    command.arg("run").arg("--kernel").arg(path.as_ref());
    command
}

/// Runs what has to fail with this code before any guest starts. The text has to have all of `words`, name what
/// failed first, give a hint last, and keep to three lines.
#[track_caller]
pub fn expect_mistake(command: &mut Command, code: i32, words: &[&str]) {
    let ended = Running::start(command).wait(LIMIT).expect_code(code);
    assert_eq!(ended.output, "", "no guest ran: {command:?}");
    let errors = &ended.errors;
    let lines: Vec<&str> = errors.lines().collect();
    assert!((2..=3).contains(&lines.len()), "two or three lines: {command:?}\n{errors}");
    assert!(lines[0].starts_with("tranche: error: "), "{errors}");
    assert!(lines.len() == 2 || lines[1].starts_with("  cause: "), "{errors}");
    assert!(lines[lines.len() - 1].starts_with("  hint: "), "{errors}");
    for word in words {
        assert!(errors.contains(word), "no '{word}' for {command:?} in:\n{errors}");
    }
}

/// The same program in a mount namespace of its own, after a shell script as root.
pub fn after_script(script: &str, command: &Command) -> Command {
    let mut other = Command::new("unshare");
    other.args(["--mount", "sh", "-ec"]).arg(format!("{script}\nexec \"$0\" \"$@\""));
    other.arg(command.get_program()).args(command.get_args());
    command.get_envs().for_each(|(name, value)| {
        other.env(name, value.unwrap_or_default());
    });
    other
}

/// Whether this machine lets a test have a mount namespace and other users; says so if not.
pub fn is_root(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        not_tested(&format!("{what}: only root can"));
    }
    root
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
