//! Limits that take a cgroup, for who has none to make groups in: systemd gives one, which this process goes on in.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::config::Share;
use crate::jail;

/// Set for a process that has been through it.
const BEEN_THERE: &str = "TRANCHE_SCOPE";

/// Begins this program anew in a scope of its own, if that is what it takes. Nothing may have been begun yet.
///
/// Without a service manager it goes on as it is: whoever makes the group says then what is missing.
pub fn enter(share: &Share) {
    if !share.needs_cgroup() || jail::can_make_cgroup() || std::env::var_os(BEEN_THERE).is_some() {
        return;
    }
    let is_root = rustix::process::geteuid().is_root();
    let run =
        if is_root { Some(PathBuf::from("/run")) } else { std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) };
    if !run.is_some_and(|run| run.join("systemd/private").exists()) {
        return;
    }
    let program = std::env::current_exe().unwrap_or_else(|_| Path::new("/proc/self/exe").into());
    let mut command = Command::new("systemd-run");
    command.args((!is_root).then_some("--user")).args(["--scope", "--quiet", "--collect", "--property=Delegate=yes"]);
    command.args(["--description=a VM of Tranche", "--"]).arg(program).args(std::env::args_os().skip(1));
    let error = command.env(BEEN_THERE, "1").exec();
    tracing::warn!("systemd-run cannot be run: {error}");
}
