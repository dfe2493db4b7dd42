//! `tranche disk` as a user has it: files that appear whole, figures that are true, exit codes 2 and 30 to 35.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use tempfile::tempdir;

use crate::mistake::{LIMIT, expect_mistake, names, run};
use crate::support::{Running, tranche};

/// `tranche disk` with these words, in `dir`.
fn disk(dir: &Path, words: &str) -> Command {
    let mut command = tranche();
    command.current_dir(dir).arg("disk").args(words.split(' '));
    command
}

fn done(dir: &Path, words: &str) -> String {
    let ended = Running::start(&mut disk(dir, words)).wait(LIMIT).expect_code(0);
    let fine = ["", "it was closed cleanly: nothing to do\n"];
    assert!(fine.contains(&&*ended.errors), "{words}: {}", ended.errors);
    ended.output
}

/// What `info --json` says under a key.
fn info(dir: &Path, words: &str, key: &str) -> serde_json::Value {
    let text = done(dir, &format!("info --json {words}"));
    serde_json::from_str::<serde_json::Value>(&text).unwrap()[key].clone()
}

#[test]
fn a_disk_is_made_looked_at_enlarged_and_copied() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    done(dir, "create base.img 3M");
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(dir.join("base.img")).unwrap(),
        b"something",
        1 << 20,
    )
    .unwrap();
    done(dir, "create --format qcow2 --backing base.img,format=raw top.qcow2");
    assert_eq!(info(dir, "--format qcow2 top.qcow2", "size"), 3 << 20);
    assert!(done(dir, "info --format qcow2 top.qcow2").contains("base.img"));
    done(dir, "resize --format qcow2 --backing base.img,format=raw top.qcow2 5M");
    assert_eq!(info(dir, "--format qcow2 top.qcow2", "size"), 5 << 20);
    done(dir, "convert --from qcow2 --to raw --backing base.img,format=raw top.qcow2 copy.img");
    let (base, copy) = (std::fs::read(dir.join("base.img")).unwrap(), std::fs::read(dir.join("copy.img")).unwrap());
    assert_eq!(copy.len(), 5 << 20);
    assert!(copy[..3 << 20] == base[..] && copy[3 << 20..].iter().all(|&byte| byte == 0));
    assert!(std::fs::metadata(dir.join("copy.img")).unwrap().blocks() * 512 < 1 << 20, "zeroes take no space");
    done(dir, "repair top.qcow2");
    done(dir, "resize --shrink copy.img 1M");
    assert_eq!(info(dir, "copy.img", "size"), 1 << 20);
    assert_eq!(names(dir), ["base.img", "copy.img", "top.qcow2"]);
}

#[test]
fn mistakes_leave_everything_as_it_was() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    done(dir, "create a.img 1M");
    done(dir, "create --format qcow2 a.qcow2 1M");
    done(dir, "create --format qcow2 --backing a.img,format=raw over.qcow2");
    std::fs::write(dir.join("short.qcow2"), &std::fs::read(dir.join("a.qcow2")).unwrap()[..50]).unwrap();
    let before = names(dir);
    for (words, code, text) in [
        ("create a.img 2M", 35, "a.img"),
        ("create no/such/dir.img 1M", 35, "no/such/dir.img"),
        ("info none.img", 30, "none.img"),
        ("info --format qcow2 a.img", 33, "a.img"),
        ("info --format qcow2 short.qcow2", 33, "short.qcow2"),
        ("convert --from qcow2 --to raw over.qcow2 new.img", 34, "backing"),
        ("convert --from raw --to qcow2 a.img a.qcow2", 35, "a.qcow2"),
        ("resize a.img 512K", 35, "--shrink"),
    ] {
        expect_mistake(&mut disk(dir, words), code, &[text]);
        assert_eq!(names(dir), before, "{words}");
    }
    assert_eq!(std::fs::metadata(dir.join("a.img")).unwrap().len(), 1 << 20);
}

#[test]
fn a_disk_of_a_running_vm_is_left_alone() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    done(dir, "create --format qcow2 a.qcow2 1M");
    let argument = format!("{},format=qcow2", dir.join("a.qcow2").display());
    let running = Running::start(run().args(["--cmdline", "end=halt", "--disk", &argument]));
    running.output.wait_for("\nend\n", LIMIT);
    for words in ["repair a.qcow2", "resize --format qcow2 a.qcow2 2M", "convert --from qcow2 --to raw a.qcow2 b.img"] {
        expect_mistake(&mut disk(dir, words), 31, &["a.qcow2", "in use"]);
    }
    assert!(done(dir, "info --format qcow2 a.qcow2").contains("for writing"));
    drop(running);
    done(dir, "repair a.qcow2");
}

#[test]
fn formats_and_backing_files_are_not_guessed() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    done(dir, "create base.img 1M");
    done(dir, "create --format qcow2 --backing base.img,format=raw top.qcow2");
    let with = |text: &str| {
        let mut command = run();
        command.current_dir(dir).args(["--disk", text]);
        command
    };
    expect_mistake(&mut with("top.qcow2"), 33, &["begins like a qcow2 image", "format=qcow2"]);
    expect_mistake(&mut with("top.qcow2,format=qcow2"), 34, &["base.img", "none is named", "backing=PATH"]);
    expect_mistake(&mut with("base.img,format=qcow2"), 33, &["base.img", "format=raw"]);
    expect_mistake(&mut with("top.qcow2,format=qcow2,backing=none.img"), 30, &["none.img"]);
    Running::start(&mut with("top.qcow2,format=qcow2,backing=base.img")).wait(LIMIT).expect_code(0);
    Running::start(&mut with("top.qcow2,format=raw")).wait(LIMIT).expect_code(0);
}
