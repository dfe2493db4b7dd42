//! Hosts that say no: full disks, directories of others.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::home::{Home, LIMIT, sparse, tool};
use crate::support::{Running, guests, not_tested};

/// `tranche` with these words, where `script` has been run, with mounts that nobody else sees; none without root.
fn after(script: &str, home: &Home, words: &[&str]) -> Option<Command> {
    if !rustix::process::geteuid().is_root() {
        not_tested("full disks and other users, which only root can play");
        return None;
    }
    let command = home.command(words);
    let mut all = Command::new("unshare");
    all.args(["-m", "sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"]);
    all.arg(command.get_program()).args(command.get_args()).current_dir(home.dir.path());
    all.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Some(all)
}

#[test]
fn a_full_disk_has_no_half_of_a_vm() {
    let home = Home::new();
    let kernel = guests().join("hello");
    std::fs::create_dir(home.path("state")).unwrap();
    let state = home.path("state");
    // Room for directories, and none for what is in them.
    let full = format!(
        "mount -t tmpfs -o size=8k none {0}\nmkdir -p {0}/tranche/vms\ncat /dev/zero > {0}/filler 2> /dev/null || true",
        state.display()
    );
    let words = ["create", "a", "--kernel", kernel.to_str().unwrap()];
    let Some(mut command) = after(&full, &home, &words) else { return };
    let ended = Running::start(&mut command).wait(LIMIT).expect_code(95);
    assert!(ended.errors.contains("No space left on device"), "{}", ended.errors);
    assert!(ended.errors.lines().count() <= 3, "{}", ended.errors);
    let left = format!("{full}\n\"$@\" || true\nls -A {}/tranche/vms; exit 0", state.display());
    let mut command = after(&left, &home, &words).unwrap();
    assert_eq!(Running::start(&mut command).wait(LIMIT).expect_code(0).output, "", "nothing is left behind");
}

#[test]
fn a_disk_does_not_grow_where_its_file_system_could_not_be_written() {
    const MIB: u64 = 1 << 20;
    let home = Home::new();
    std::fs::create_dir(home.path("disks")).unwrap();
    sparse(&home.path("disk"), 32 * MIB);
    tool("mke2fs", &["-q", "-t", "ext4", home.path("disk").to_str().unwrap()]);
    let kernel = guests().join("hello");
    std::fs::create_dir_all(home.path("disks")).unwrap();
    std::fs::copy(home.path("disk"), home.path("disks/d")).unwrap();
    home.done(&["create", "a", "--kernel", kernel.to_str().unwrap(), "--disk", "disks/d,id=d"]);
    let full = format!(
        "mount -t tmpfs -o size=36m none {0}/disks\ncp --sparse=always {0}/disk {0}/disks/d\n\
         head -c 30M /dev/zero > {0}/disks/filler || true",
        home.dir.path().display()
    );
    let Some(mut command) = after(&full, &home, &["resize", "a", "--disk", "d=512M"]) else { return };
    let ended = Running::start(&mut command).wait(LIMIT).expect_code(97);
    assert!(ended.errors.contains("for its file system's own tables"), "{}", ended.errors);
    assert!(home.inspect("a")["definition"]["disk-sizes"].is_null());
}

#[test]
fn a_directory_of_another_user_is_not_written_to() {
    let home = Home::new();
    home.create("a", "hello", "", &[]);
    let Some(_) = after("", &home, &[]) else { return };
    // The program where anybody gets at it; the state is root's.
    let place = home.path("program");
    std::fs::copy(env!("CARGO_BIN_EXE_tranche"), &place).unwrap();
    let open = |path: &std::path::Path| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    [home.dir.path(), &place].into_iter().for_each(open);
    let run = |words: &[&str]| {
        let command = home.command(words);
        let mut theirs = Command::new(&place);
        theirs.args(words).current_dir("/").uid(65_534).gid(65_534);
        theirs.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Running::start(&mut theirs).wait(LIMIT)
    };
    let ended = run(&["ls"]).expect_code(95);
    assert!(ended.errors.contains("Permission denied") && ended.errors.contains("of yours"), "{}", ended.errors);
    run(&["start", "a"]).expect_code(90);
    assert_eq!(home.state("a"), "stopped");
}

#[test]
fn without_e2fsprogs_the_owner_is_told_what_is_left_to_do() {
    const MIB: u64 = 1 << 20;
    let home = Home::new();
    let disk = home.path("d");
    sparse(&disk, 32 * MIB);
    tool("mke2fs", &["-q", "-t", "ext4", disk.to_str().unwrap()]);
    let kernel = guests().join("hello");
    home.done(&["create", "a", "--kernel", kernel.to_str().unwrap(), "--disk", "d,id=d"]);
    let without = "mount -t tmpfs none /usr/sbin";
    let Some(mut command) = after(without, &home, &["resize", "a", "--disk", "d=64M"]) else { return };
    let ended = Running::start(&mut command).wait(LIMIT).expect_code(0);
    for text in [&ended.output, &ended.errors] {
        assert!(text.contains("then, in the guest: resize2fs /dev/vda"), "{text}");
    }
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 64 * MIB);
    // What it needs was 32 MiB, which is still there.
    let mut command = after(without, &home, &["resize", "a", "--disk", "d=16M"]).unwrap();
    let ended = Running::start(&mut command).wait(LIMIT).expect_code(97);
    assert!(ended.errors.contains("cannot be made smaller without e2fsck"), "{}", ended.errors);
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 64 * MIB);
}
