//! Firecracker's clients as they come, against our program under that name: firecracker-python and the crate fctools.
//! `tests/clients/prepare` gets them, and has to have run.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::guest::{LIMIT, assets, turn};
use crate::net::Tap;
use crate::support::{Running, not_tested, prepared_client};

/// A directory with our program in `bin`, called `firecracker`.
fn with_firecracker() -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("bin")).unwrap();
    symlink(env!("CARGO_BIN_EXE_tranche"), dir.path().join("bin/firecracker")).unwrap();
    dir
}

fn ours(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Its last word is that all is well; everything else is a failure, and what it said tells why.
fn expect_all_well(client: &mut Command) {
    let ended = Running::start(client).wait(4 * LIMIT).expect_code(0);
    assert!(ended.output.ends_with("all is well\n"), "{}", ended.output);
}

#[test]
fn fctools() {
    let Some(client) = prepared_client("fctools-client") else {
        return not_tested("the client fctools (tests/clients/prepare)");
    };
    let _turn = turn();
    let dir = with_firecracker();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("data"), [0; 1 << 20]).unwrap();
    let tap = Tap::new("tranche-fctools", "172.30.9.1/24");
    let guest = assets();
    expect_all_well(
        Command::new(client)
            .args([path("bin/firecracker"), path("api.sock")])
            .args([guest.join("cloud/vmlinuz"), guest.join("cloud/initrd"), guest.join("rootfs.ext4"), path("data")])
            .arg(tap.0),
    );
}

/// The client names no `root=` to a kernel that has an initrd. So this one knows the root itself, as a distribution's
/// does: another `/init` behind the first archive takes the place of its own.
fn initrd_with_a_root(dir: &Path) -> PathBuf {
    let init = fs::read_to_string(ours("resources/linux/initrd-init")).unwrap();
    let knowing = init.replacen("root='' type=ext4 mode=ro", "root=/dev/vda type=ext4 mode=rw", 1);
    assert_ne!(init, knowing, "the initrd's defaults are not where they are looked for");
    fs::write(dir.join("init"), knowing).unwrap();
    let archive = "chmod 755 init && echo init | cpio --quiet --create --format=newc --owner=0:0";
    let archive = Command::new("sh").args(["-c", archive]).current_dir(dir).stderr(Stdio::inherit()).output().unwrap();
    assert!(archive.status.success());
    let mut initrd = fs::read(assets().join("cloud/initrd")).unwrap();
    initrd.extend(archive.stdout);
    let path = dir.join("initrd");
    fs::write(&path, initrd).unwrap();
    path
}

/// A root disk whose login shell runs our script.
fn root_disk(dir: &Path) -> PathBuf {
    let disk = dir.join("rootfs.ext4");
    fs::copy(assets().join("rootfs.ext4"), &disk).unwrap();
    let script = format!("write {} /root/.profile", ours("tests/clients/python/profile.sh").display());
    let debugfs =
        Command::new("debugfs").env("PATH", "/usr/sbin:/sbin").args(["-w", "-R", &script]).arg(&disk).output();
    assert!(debugfs.unwrap().status.success());
    disk
}

#[test]
fn firecracker_python() {
    let Some(python) = prepared_client("python/bin/python") else {
        return not_tested("the client firecracker-python (tests/clients/prepare)");
    };
    let _turn = turn();
    let dir = with_firecracker();
    let (initrd, disk) = (initrd_with_a_root(dir.path()), root_disk(dir.path()));
    // The client's paths are fixed. In a mount namespace of its own they are ours.
    let namespace = "mount -t tmpfs var /var/lib && mkdir /var/lib/firecracker &&
        mount -t overlay -o lowerdir=\"$1/bin:/usr/local/bin\" bin /usr/local/bin && shift && exec \"$@\"";
    expect_all_well(
        Command::new("unshare")
            .args(["--mount", "sh", "-c", namespace, "sh"])
            .arg(dir.path())
            .arg(python)
            .arg(ours("tests/clients/python/microvm.py"))
            .arg(dir.path())
            .args([assets().join("cloud/vmlinuz"), initrd, disk]),
    );
}
