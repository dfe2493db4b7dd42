//! A root disk over a base that many may share: what the guest writes is in its own image, and there at the next boot.

use std::process::Command;

use crate::guest::{Guest, LIMIT, assets, value};
use crate::support::tranche;

#[test]
fn a_guest_lives_on_in_its_overlay() {
    let dir = tempfile::TempDir::new().unwrap();
    let (base, top) = (assets().join("rootfs.ext4"), dir.path().join("top.qcow2"));
    let sum = |path| Command::new("md5sum").arg(path).output().unwrap().stdout;
    let before = sum(&base);
    let created = tranche()
        .args(["disk", "create", "--format", "qcow2", "--backing"])
        .arg(format!("{},format=raw", base.display()))
        .arg(&top)
        .status();
    assert!(created.unwrap().success());
    let root = format!("{},format=qcow2,backing={}", top.display(), base.display());
    let boot = |script: &str| {
        let kernel = assets().join("cloud");
        let mut guest = Guest::on_root(&kernel.join("vmlinuz"), &kernel.join("initrd"), &root);
        guest.start(script).wait(LIMIT).expect_code(0)
    };
    boot("seq 1 300000 > /root/numbers; md5sum /root/numbers > /root/sum; rm /etc/motd; sync");
    let ended = boot("md5sum -c /root/sum > /dev/null; echo same=$?; [ -e /etc/motd ]; echo motd=$?");
    assert_eq!(value(&ended.output, "same"), "0");
    assert_eq!(value(&ended.output, "motd"), "1");
    assert_eq!(sum(&base), before, "the base stays as it was");
    let checked = tranche().args(["disk", "info", "--format", "qcow2"]).arg(&top).output().unwrap();
    assert!(String::from_utf8(checked.stdout).unwrap().contains("in use:     no"));
}
