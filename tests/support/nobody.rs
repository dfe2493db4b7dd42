//! An ordinary user, played by root: another user ID, device nodes of one's own.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::guests;

/// Mounts a place for device nodes where only this process and its children see it.
const PLACE: &str = "mount -t tmpfs -o mode=755 none /mnt";

/// The program under test and a guest where any user gets at them.
pub struct Nobody {
    dir: TempDir,
}

impl Nobody {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_tranche"), dir.path().join("tranche")).unwrap();
        std::fs::copy(guests().join("hello"), dir.path().join("hello")).unwrap();
        Self { dir }
    }

    /// A kernel that any user gets at.
    pub fn kernel(&self) -> PathBuf {
        self.dir.path().join("hello")
    }

    /// Runs a guest at a level of jail where Linux makes no user namespaces: in a root directory that is not its mount
    /// namespace's.
    pub fn run_without_user_namespaces(&self, level: &str) -> Command {
        let mut command = Command::new("unshare");
        let script = "mount --rbind / /mnt\nmount -t tmpfs -o mode=755 none /mnt/mnt\n\
                      mknod -m 666 /mnt/mnt/kvm c $(stat -c '0x%t 0x%T' /dev/kvm)\n\
                      mount --bind /mnt/mnt/kvm /mnt/dev/kvm\n\
                      exec chroot --userspec=65534:65534 /mnt \"$0\" \"$@\"";
        command.args(["--mount", "sh", "-ec"]).arg(script);
        command.arg(self.dir.path().join("tranche")).args(["run", "--jail", level, "--kernel"]).arg(self.kernel());
        command.env("XDG_CACHE_HOME", self.dir.path().join("no-such-cache"));
        command
    }

    /// A file that only root can read.
    pub fn private_file(&self) -> PathBuf {
        let path = self.dir.path().join("private");
        std::fs::write(&path, [0; 4096]).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Runs a guest with `/dev/kvm` and these other device nodes open to all.
    pub fn run(&self, devices: &[&str]) -> Command {
        self.run_kernel(&self.dir.path().join("hello"), devices)
    }

    pub fn run_kernel(&self, kernel: &Path, devices: &[&str]) -> Command {
        let mut script = format!("{PLACE}\n");
        for device in ["/dev/kvm"].iter().chain(devices) {
            let node = format!("/mnt/{}", device.replace('/', "-"));
            script += &format!("mknod -m 666 {node} c $(stat -c '0x%t 0x%T' {device})\nmount --bind {node} {device}\n");
        }
        self.with_script(&script, kernel)
    }

    /// The same with the host's own nodes, made private to root.
    pub fn run_without_kvm(&self) -> Command {
        let script =
            format!("{PLACE}\nmknod -m 600 /mnt/kvm c $(stat -c '0x%t 0x%T' /dev/kvm)\nmount --bind /mnt/kvm /dev/kvm");
        self.with_script(&script, &self.dir.path().join("hello"))
    }

    fn with_script(&self, script: &str, kernel: &Path) -> Command {
        let mut command = Command::new("unshare");
        let user = "setpriv --reuid=65534 --regid=65534 --clear-groups";
        command.args(["--mount", "sh", "-ec"]).arg(format!("{script}\nexec {user} \"$0\" \"$@\""));
        command.arg(self.dir.path().join("tranche")).arg("run").arg("--kernel").arg(kernel);
        command.env("XDG_CACHE_HOME", self.dir.path().join("no-such-cache"));
        command
    }
}
