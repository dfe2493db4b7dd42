//! Disks: what the guest writes is in the file, and only what it may.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::guest::{Guest, LIMIT, assets, value};
use crate::support::{Running, tranche};

const MIB: u64 = 1 << 20;

#[test]
fn data_goes_both_ways_and_limits_hold() {
    let mut guest = Guest::new("cloud");
    let path = guest.dir.path().join("data.img");
    let file = File::create_new(&path).unwrap();
    file.set_len(64 * MIB).unwrap();
    let read_only = guest.dir.path().join("ro.img");
    std::fs::write(&read_only, vec![0x5a; 4 << 20]).unwrap();
    guest.command.args(["--cpus", "2", "--disk"]);
    guest.command.arg(format!("{},id=data,queues=2,engine=io_uring", path.display()));
    guest
        .command
        .arg("--disk")
        .arg(format!("{},ro,id=fixed,engine=sync,bandwidth=256K/10,ops=20/10", read_only.display()));
    let ended = guest.start(
        "
data=$(disk data) fixed=$(disk fixed)
echo sectors=$(cat /sys/block/${data##*/}/size)
echo readonly=$(cat /sys/block/${fixed##*/}/ro)
dd if=$fixed bs=1M 2>/dev/null | md5sum | sed 's/ .*//; s/^/fixed=/'
dd if=/dev/zero of=$fixed bs=4096 count=1 2>/dev/null && echo wrote=yes || echo wrote=no
# A pattern that the host can make again: the numbers of the lines.
seq 1 500000 | head -c 3145728 > /tmp/pattern
dd if=/tmp/pattern of=$data bs=65536 seek=16 conv=fsync 2>/dev/null
# Four at a time, past the guest's cache, each to 3 MiB of its own from 8 MiB on, and back.
ls /sys/block/${data##*/}/mq | wc -l | sed 's/^/queues=/'
md5sum < /tmp/pattern | sed 's/ .*//; s/^/pattern=/'
for i in 0 1 2 3; do dd if=/tmp/pattern of=$data bs=65536 seek=$((128 + 48 * i)) oflag=direct 2>/dev/null & done; wait
for i in 0 1 2 3; do dd if=$data bs=65536 skip=$((128 + 48 * i)) count=48 iflag=direct 2>/dev/null | md5sum > /tmp/sum$i & done; wait
sort -u /tmp/sum? | sed 's/ .*//; s/^/back=/'
cat /sys/block/${data##*/}/queue/discard_max_bytes | sed 's/^/discardmax=/'
cat /sys/block/${data##*/}/queue/write_zeroes_max_bytes | sed 's/^/zeroesmax=/'
cat /sys/block/${data##*/}/queue/write_cache | sed 's/^/cache=/'
",
    );
    let ended = ended.wait(LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "sectors"), (64 * MIB / 512).to_string());
    assert_eq!(value(&ended.output, "readonly"), "1");
    assert_eq!(value(&ended.output, "wrote"), "no");
    assert_eq!(value(&ended.output, "cache"), "write back");
    assert_ne!(value(&ended.output, "discardmax"), "0");
    assert_ne!(value(&ended.output, "zeroesmax"), "0");
    let written = std::fs::read(&path).unwrap();
    let pattern: Vec<u8> = (1..=500_000).flat_map(|n: u32| format!("{n}\n").into_bytes()).take(3 << 20).collect();
    assert!(written[MIB as usize..][..pattern.len()] == pattern, "what the guest wrote is in the file, in its place");
    for copy in written[8 << 20..20 << 20].chunks(3 << 20) {
        assert!(copy == pattern, "and so is what it wrote four at a time");
    }
    let rest = [0..1 << 20, 4 << 20..8 << 20, 20 << 20..64 << 20];
    assert!(rest.into_iter().all(|range| written[range].iter().all(|b| *b == 0)), "and nothing else");
    assert_eq!(value(&ended.output, "queues"), "2");
    assert_eq!(value(&ended.output, "back"), value(&ended.output, "pattern"), "all four alike");
    assert_eq!(value(&ended.output, "fixed"), md5_of(&read_only));
    assert!(std::fs::read(&read_only).unwrap().iter().all(|b| *b == 0x5a), "a read-only disk stays as it is");
}

fn md5_of(path: &Path) -> String {
    String::from_utf8(Command::new("md5sum").arg(path).output().unwrap().stdout).unwrap()[..32].to_owned()
}

#[test]
fn a_file_system_is_written_and_read_again_by_the_next_guest() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root.ext4");
    copy_sparse(&assets().join("rootfs.ext4"), &root);
    let before = std::fs::metadata(&root).unwrap().blocks();
    let write =
        "mount -o remount,rw,discard / && seq 1 400000 > /data && sync && md5sum /data | sed 's/ .*//; s/^/sum=/'";
    let first = with_root(&root).run(write).expect_code(0);
    let during = std::fs::metadata(&root).unwrap().blocks();
    assert!(during > before + 2000, "the file takes space: {before} -> {during} blocks");
    let read = "md5sum /data | sed 's/ .*//; s/^/sum=/'; mount -o remount,rw,discard / && rm /data && sync && fstrim / ; echo done=yes";
    let second = with_root(&root).run(read).expect_code(0);
    assert_eq!(value(&first.output, "sum"), value(&second.output, "sum"));
    let after = std::fs::metadata(&root).unwrap().blocks();
    assert!(after < during - 2000, "discarded space goes back to the host: {during} -> {after} blocks");
}

/// The cloud kernel on a root disk of the test's own, writable.
fn with_root(root: &Path) -> Guest {
    let cloud = assets().join("cloud");
    Guest::on_root(&cloud.join("vmlinuz"), &cloud.join("initrd"), root.to_str().unwrap())
}

fn copy_sparse(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_disk_in_use_is_refused_to_a_second_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.img");
    File::create_new(&path).unwrap().set_len(MIB).unwrap();
    let mut guest = Guest::new("cloud");
    guest.command.arg("--disk").arg(&path);
    let running = guest.start("echo READY; sleep 600");
    running.output.wait_for("READY", LIMIT);
    for how in ["", ",ro"] {
        let mut command = tranche();
        command.arg("run").arg("--kernel").arg(assets().join("cloud/vmlinuz"));
        command.arg("--disk").arg(format!("{}{how}", path.display()));
        let ended = Running::start(&mut command).wait(LIMIT).expect_code(31);
        assert!(ended.errors.contains("data.img"), "{}", ended.errors);
    }
    running.signal(rustix::process::Signal::KILL);
    drop(running);
    // A killed VM leaves no lock behind.
    drop(guest);
    let mut guest = Guest::new("cloud");
    guest.command.arg("--disk").arg(&path);
    guest.run("true").expect_code(0);
}
