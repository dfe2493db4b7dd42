//! Cold resize: plans, disks with what is on them, refusals, and the way back.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::home::{Home, LIMIT, sparse, tool};
use crate::support::Running;

const MIB: u64 = 1 << 20;

/// A disk with a GPT, whose second and last partition is an ext4 file system of `mib` MiB with a file of a MiB on it.
fn partitioned(path: &Path, mib: u64) -> String {
    let offset = 18_432 * 512;
    let disk = sparse(path, mib * MIB).to_owned();
    let table = path.with_extension("table");
    fs::write(&table, "label: gpt\nsize=8MiB, type=L\ntype=L\n").unwrap();
    let path_env = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut sfdisk = std::process::Command::new("sfdisk");
    sfdisk.env("PATH", path_env).args(["-q", &disk]).stdin(fs::File::open(&table).unwrap());
    assert!(sfdisk.status().unwrap().success());
    ext4(path, &["-E", &format!("offset={offset}")], &format!("{}M", mib - 10));
    format!("{disk}?offset={offset}")
}

/// Makes an ext4 file system with a file of a MiB on it.
fn ext4(path: &Path, options: &[&str], size: &str) {
    let tree = path.with_extension("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), vec![0xa5; MIB as usize]).unwrap();
    let (path, tree) = (path.to_str().unwrap(), tree.to_str().unwrap());
    tool("mke2fs", &[&["-q", "-t", "ext4", "-b", "4096", "-d", tree][..], options, &[path, size]].concat());
}

/// Checks that a file system is sound, still has its file, and has so many bytes.
#[track_caller]
fn expect_ext4(place: &str, bytes: u64) {
    tool("e2fsck", &["-f", "-n", place]);
    assert!(tool("debugfs", &["-R", "stat file", place]).contains("Size: 1048576"));
    let about = tool("dumpe2fs", &["-h", place]);
    let count = about.lines().find_map(|line| line.strip_prefix("Block count:")).unwrap().trim();
    assert_eq!(count.parse::<u64>().unwrap() * 4096, bytes, "{place}");
}

#[track_caller]
fn expect_sound_table(path: &Path, mib: u64, last_mib: u64) {
    assert_eq!(fs::metadata(path).unwrap().len(), mib * MIB);
    let said = tool("sgdisk", &["-v", path.to_str().unwrap()]);
    assert!(said.contains("No problems found"), "{said}");
    let parts = tool("sgdisk", &["-i", "2", path.to_str().unwrap()]);
    assert!(parts.contains(&format!("Partition size: {} sectors", last_mib * 2048)), "{parts}");
}

fn plan(home: &Home, words: &[&str]) -> Value {
    let words = [&["resize", "a", "--dry-run", "--format", "json"][..], words].concat();
    serde_json::from_str(&home.done(&words)).unwrap()
}

#[test]
fn a_vm_that_is_stopped_is_changed_at_once() {
    let home = Home::new();
    let (root, data) = (home.path("root.img"), home.path("data.img"));
    sparse(&root, 64 * MIB);
    ext4(&root, &[], "64M");
    let place = partitioned(&data, 64);
    home.create("a", "hello", "end=halt", &["--rootfs", "root.img", "--disk", "data.img,id=data"]);
    let words = ["--cpus", "3", "--memory", "64M", "--disk", "root=256M", "--disk", "data=200M"];

    let before = (home.inspect("a")["definition"].clone(), fs::read(&root).unwrap());
    let planned = plan(&home, &words);
    assert_eq!((home.inspect("a")["definition"].clone(), fs::read(&root).unwrap()), before, "a plan changes nothing");
    let changes = planned["changes"].as_array().unwrap();
    let told: Vec<_> =
        changes.iter().map(|c| [&c["what"], &c["from"], &c["to"]].map(|t| t.as_str().unwrap())).collect();
    let expected =
        [["vCPUs", "1", "3"], ["memory", "32M", "64M"], ["disk 'root'", "64M", "256M"], ["disk 'data'", "64M", "200M"]];
    assert_eq!(told, expected);
    assert!(changes.iter().all(|change| change["needs-stop"] == true));
    assert!(changes[3]["guest"].as_str().unwrap().contains("/dev/vdb of 200M, and partition 2 and its ext4"));
    assert!(planned["host"]["memory-available"].is_string() && planned["host"]["disks"][0]["free"].is_string());

    let said = home.run(&[&["resize", "a"][..], &words].concat()).expect_code(0);
    assert!(said.output.contains("vCPUs: 1 -> 3") && said.output.contains("can be undone"), "{}", said.output);
    assert!(said.errors.contains("/dev/vda has 256M, and its ext4 file system fills it"), "{}", said.errors);
    let definition = &home.inspect("a")["definition"];
    assert_eq!((&definition["vm"]["cpus"], &definition["vm"]["memory"]), (&3.into(), &"64M".into()));
    expect_ext4(root.to_str().unwrap(), 256 * MIB);
    expect_sound_table(&data, 200, 190);
    expect_ext4(&place, 190 * MIB);

    // Smaller again, as far as what is on it lets it be.
    home.done(&["resize", "a", "--disk", "data=50M", "--disk", "root=100M"]);
    expect_sound_table(&data, 50, 40);
    expect_ext4(&place, 40 * MIB);
    assert_eq!(fs::metadata(&root).unwrap().len(), 100 * MIB);
    expect_ext4(root.to_str().unwrap(), 100 * MIB);
    let said =
        home.refused(&["resize", "a", "--disk", "data=12M"], 97, "cannot be made so small: its file system needs");
    assert!(said.contains("remove files from it"), "{said}");
    expect_ext4(&place, 40 * MIB);
    assert_eq!(home.done(&["resize", "a", "--disk", "data=50M", "--cpus", "3"]), "there is nothing to change\n");
}

#[test]
fn what_would_lose_something_or_cannot_be_is_refused() {
    let home = Home::new();
    for name in ["plain", "xfs", "damaged", "dirty"] {
        sparse(&home.path(name), 32 * MIB);
    }
    fs::write(home.path("xfs"), [&b"XFSB"[..], &[0; 4092]].concat()).unwrap();
    sparse_to(&home.path("xfs"), 32 * MIB);
    partitioned(&home.path("damaged"), 32);
    let mut bytes = fs::read(home.path("damaged")).unwrap();
    bytes[512 + 60] ^= 1;
    fs::write(home.path("damaged"), &bytes).unwrap();
    ext4(&home.path("dirty"), &[], "32M");
    // A root directory that is no directory any more: what e2fsck does not mend without asking.
    tool("debugfs", &["-w", "-R", "clri <2>", home.path("dirty").to_str().unwrap()]);
    home.done(&["disk", "create", "--format", "qcow2", "q", "64M"]);
    let disks = ["plain", "xfs", "damaged", "dirty"].map(|name| format!("{name},id={name}"));
    let mut words: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk.as_str()]).collect();
    words.extend(["--disk", "q,id=q,format=qcow2", "--disk", "plain,id=ro,ro", "--rootfs", "/dev/null"]);
    assert_ne!(home.run(&[&["create", "x"][..], &words[..2]].concat()).status.code(), Some(0));
    words.truncate(words.len() - 2);
    home.create("a", "hello", "end=halt", &words);
    let before = home.inspect("a")["definition"].clone();
    for (words, code, what) in [
        (&["--disk", "none=1G"][..], 2, "has no disk 'none': it has plain, xfs, damaged, dirty, q, ro"),
        (&["--disk", "plain=1000"], 2, "has to be a multiple of 512 bytes"),
        (&["--disk", "plain=0"], 2, "has to be a multiple"),
        (&["--disk", "plain"], 2, "such as root=10G"),
        (&["--disk", "plain=16M"], 97, "something unknown is on it"),
        (&["--disk", "xfs=16M"], 97, "XFS is on it"),
        (&["--disk", "damaged=64M"], 97, "its GPT is damaged: the checksum of its header is wrong"),
        (&["--disk", "dirty=64M"], 97, "e2fsck says no (exit status 4)"),
        (&["--disk", "q=32M"], 97, "cannot be made smaller"),
        (&["--disk", "ro=64M"], 97, "is read-only"),
        (&["--remove-disk", "none"], 2, "has no disk 'none'"),
        (&["--add-disk", "/missing"], 30, "No such file"),
        (&["--add-disk", "q,id=plain"], 2, "two disks have the id 'plain'"),
        (&["--cpus", "65"], 2, "65 vCPUs are out of range"),
        (&["--memory", "1M"], 2, "too little"),
        (&["--live", "--disk", "plain=64M"], 93, "does not run"),
        (&["--live", "--cpus", "2"], 2, "cannot be used with"),
    ] {
        home.refused(&[&["resize", "a"][..], words].concat(), code, what);
    }
    assert_eq!(home.inspect("a")["definition"], before);
    for name in ["plain", "xfs", "damaged", "dirty"] {
        assert_eq!(fs::metadata(home.path(name)).unwrap().len(), 32 * MIB, "{name}");
    }
    home.refused(&["resize", "nobody", "--cpus", "2"], 90, "no VM 'nobody'");
    // What nobody here knows becomes larger, and its owner is told what is left to do.
    let said = home.run(&["resize", "a", "--disk", "xfs=64M", "--disk", "q=128M"]).expect_code(0).errors;
    assert!(said.contains("xfs_growfs") && said.contains("has 128M; then, in the guest"), "{said}");
}

fn sparse_to(path: &Path, bytes: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn devices_come_and_go() {
    let home = Home::new();
    for name in ["one", "two"] {
        sparse(&home.path(name), MIB);
    }
    home.create("a", "hello", "end=halt", &["--rootfs", "one", "--net", "tap=t0,mac=02:00:00:00:00:01"]);
    home.refused(&["resize", "a", "--remove-disk", "root"], 97, "is the root disk: it stays");
    home.done(&["resize", "a", "--add-disk", "two,cache=unsafe", "--net", "user", "--net", "tap=t1"]);
    let vm = home.inspect("a")["definition"]["vm"].clone();
    assert_eq!((&vm["disks"][1]["id"], &vm["disks"][1]["cache"]), (&"disk1".into(), &"unsafe".into()));
    assert_eq!(vm["nics"][0]["mac"], "02:00:00:00:00:01", "a card in the same place is the same card");
    assert_eq!(vm["nics"].as_array().unwrap().len(), 2);
    home.done(&["resize", "a", "--remove-disk", "disk1", "--net", "none"]);
    let vm = home.inspect("a")["definition"]["vm"].clone();
    assert_eq!((vm["disks"].as_array().unwrap().len(), &vm["nics"]), (1, &json!([])));
    assert!(home.path("two").exists());
}

#[test]
fn a_running_vm_is_changed_by_its_next_start() {
    let home = Home::new();
    let disk = home.path("disk");
    sparse(&disk, 64 * MIB);
    ext4(&disk, &[], "64M");
    home.create("a", "hello", "end=button", &["--disk", "disk,id=d"]);
    home.done(&["start", "a"]);
    let said = home.run(&["resize", "a", "--cpus", "2", "--disk", "d=96M"]).expect_code(0).errors;
    assert!(said.contains("its next start is of this size"), "{said}");
    let shown = home.inspect("a");
    assert_eq!((&shown["pending"], &shown["running"]["vm"]["cpus"]), (&true.into(), &1.into()));
    assert!(home.done(&["ls"]).contains("running (changes pending)"));
    assert_eq!(fs::metadata(&disk).unwrap().len(), 64 * MIB);
    home.done(&["restart", "a"]);
    let shown = home.inspect("a");
    assert_eq!((&shown["pending"], &shown["running"]["vm"]["cpus"]), (&false.into(), &2.into()));
    assert!(home.done(&["api", "--socket", "a", "GET", "/v2/vm"]).contains(r#""vcpus":2"#));
    home.done(&["stop", "a"]);
    expect_ext4(disk.to_str().unwrap(), 96 * MIB);

    // One that cannot be done keeps the VM from its start, says why, and can be taken back.
    home.done(&["start", "a"]);
    home.done(&["resize", "a", "--disk", "d=128M"]);
    home.done(&["stop", "a"]);
    tool("debugfs", &["-w", "-R", "clri <2>", disk.to_str().unwrap()]);
    home.refused(&["start", "a"], 97, "e2fsck says no");
    assert_eq!(home.state("a"), "failed");
}

#[test]
fn a_running_guest_hears_of_a_larger_disk_at_once() {
    let home = Home::new();
    sparse(&home.path("disk"), 4 * MIB);
    home.create("a", "hello", "end=halt", &["--disk", "disk,id=d"]);
    home.done(&["start", "a"]);
    let planned = plan(&home, &["--live", "--disk", "d=8M"]);
    let change = &planned["changes"][0];
    assert_eq!((&change["to"], &change["needs-stop"]), (&"8M".into(), &false.into()), "{planned}");
    home.done(&["resize", "a", "--live", "--disk", "d=8M"]);
    assert_eq!(fs::metadata(home.path("disk")).unwrap().len(), 8 * MIB);
    assert_eq!(home.inspect("a")["pending"], false);
    // More than its VMM could have made any file until then.
    home.done(&["resize", "a", "--live", "--disk", "d=3G"]);
    assert_eq!(fs::metadata(home.path("disk")).unwrap().len(), 3 << 30);
    home.refused(
        &["resize", "a", "--live", "--disk", "d=2M"],
        97,
        "only raw disks get another size then, and become larger",
    );
    let ask = |body: &str| home.run(&["api", "--socket", "a", "PUT", "/v2/vm/resize", body]);
    let refused = ask(r#"{"disks":{"d":4194304}}"#).expect_code(70).errors;
    assert!(refused.contains("while its VM runs it becomes larger"), "{refused}");
    for (body, what) in [
        (r#"{"disks":{"x":4194304}}"#, r#"There is no drive \"x\""#),
        (r#"{"vcpus":65}"#, "65 vCPUs are out of range"),
        (r#"{"memory_bytes":1000}"#, "whole MiB"),
        (r#"{"cpus":2}"#, "unknown field"),
    ] {
        let refused = ask(body).expect_code(70).errors;
        assert!(refused.contains(what), "{body}: {refused}");
    }
    // What needs a start is kept for it; a reset is one.
    ask(r#"{"vcpus":2,"memory_bytes":67108864}"#).expect_code(0);
    let shown: Value = serde_json::from_str(&home.done(&["api", "--socket", "a", "GET", "/v2/vm"])).unwrap();
    assert_eq!((&shown["vcpus"], &shown["pending"]["vcpus"]), (&1.into(), &2.into()));
    assert_eq!(home.inspect("a")["definition"]["vm"]["cpus"], 2);
    home.done(&["power", "a", "reset"]);
    let shown: Value = serde_json::from_str(&home.done(&["api", "--socket", "a", "GET", "/v2/vm"])).unwrap();
    assert_eq!((&shown["vcpus"], &shown["memory_bytes"]), (&2.into(), &67_108_864.into()));
    assert_eq!(shown["pending"], Value::Null);
    let log = || home.done(&["logs", "a"]);
    while !log().contains("memory=100000+3f00000") {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_vm_that_does_not_come_up_goes_back() {
    let home = Home::new();
    let disk = home.path("disk");
    sparse(&disk, 64 * MIB);
    ext4(&disk, &[], "64M");
    // It says how much memory it has: with 32 MiB it is up, with more it is not.
    home.create("a", "hello", "end=button", &["--disk", "disk,id=d", "--ready", "memory=100000+1f00000"]);
    home.done(&["start", "a"]);
    let words = ["resize", "a", "--restart", "--timeout", "2", "--memory", "64M", "--disk", "d=96M"];
    let said = home.run(&words).expect_code(98).errors;
    for line in ["the VM 'a' has not booted within 2 s", "the definition is as it was", "'a' is up, as it was before"] {
        assert!(said.contains(line), "no '{line}' in:\n{said}");
    }
    // A copy that shares blocks is not to be had everywhere.
    let kept = said.contains("the disk 'd' is as it was");
    assert!(kept || said.contains("the disk 'd' keeps its new size"), "{said}");
    let shown = home.inspect("a");
    assert_eq!((&shown["state"], &shown["running"]["vm"]["memory"]), (&"running".into(), &"32M".into()));
    assert!(!home.path("disk.before-resize").exists());
    home.done(&["stop", "a"]);
    expect_ext4(disk.to_str().unwrap(), if kept { 64 } else { 96 } * MIB);

    // One that does come up stays.
    let said = home.run(&["resize", "a", "--restart", "--timeout", "20", "--cpus", "2"]).expect_code(0).errors;
    assert!(said.contains("'a' is up"), "{said}");
    assert_eq!(home.inspect("a")["running"]["vm"]["cpus"], 2);
    // One that cannot be changed runs on, as it was.
    let pid = home.pid("a");
    home.refused(&["resize", "a", "--restart", "--disk", "d=1M"], 97, "so small");
    assert!(home.state("a") == "running" && home.pid("a") != pid);
    // One that does not stop is left alone.
    home.create("b", "hello", "end=halt", &[]);
    home.done(&["start", "b"]);
    home.refused(&["resize", "b", "--restart", "--timeout", "0.2", "--cpus", "2"], 96, "has not stopped");
    assert_eq!((home.state("b"), &home.inspect("b")["definition"]["vm"]["cpus"]), ("running".into(), &1.into()));
}

#[test]
fn the_size_of_a_snapshot_stays() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &[]);
    home.done(&["start", "a"]);
    home.done(&["snapshot", "create", "a", "saved"]);
    for change in ["cpus=2", "memory=1G"] {
        let refused = home.run(&["restore", "saved", "--override", change]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(refused.errors.contains("the guest's kernel has counted its CPUs"), "{}", refused.errors);
    }
}

#[test]
fn two_changes_at_a_time_are_one_too_many() {
    let home = Home::new();
    sparse(&home.path("disk"), 64 * MIB);
    ext4(&home.path("disk"), &[], "64M");
    home.create("a", "hello", "end=halt", &["--disk", "disk,id=d"]);
    let all: Vec<_> = (0..4)
        .map(|number| {
            let size = format!("d={}M", 80 + number * 16);
            Running::start(&mut home.command(&["resize", "a", "--disk", &size]))
        })
        .collect();
    let codes: Vec<_> = all.into_iter().map(|running| running.wait(LIMIT).status.code().unwrap()).collect();
    assert!(codes.contains(&0) && codes.iter().all(|code| [0, 92].contains(code)), "{codes:?}");
    let bytes = fs::metadata(home.path("disk")).unwrap().len();
    expect_ext4(home.path("disk").to_str().unwrap(), bytes);
}
