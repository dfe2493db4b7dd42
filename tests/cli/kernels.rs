//! Imported kernels, as a user meets them: exit codes 60 to 65.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::{TempDir, tempdir};

use crate::mistake::{LIMIT, after_script, expect_mistake, is_root, names};
use crate::package::{Package, save};
use crate::support::{Ended, Running, tranche};

/// A user with a place for imported kernels.
pub struct Home {
    pub dir: TempDir,
}

impl Home {
    pub fn new() -> Self {
        Self { dir: tempdir().unwrap() }
    }

    pub fn tranche(&self, words: &[&str]) -> Command {
        let mut command = tranche();
        command.args(words).env("XDG_DATA_HOME", self.dir.path().join("data"));
        command.env("XDG_CACHE_HOME", self.dir.path().join("cache"));
        command
    }

    pub fn import(&self, source: &Path, name: &str) -> Command {
        let mut command = self.tranche(&["kernel", "import"]);
        command.arg(source).arg(name);
        command
    }

    /// All there is in the library, unfinished things too.
    pub fn kept(&self) -> Vec<String> {
        let library = self.library();
        if library.exists() { names(&library) } else { Vec::new() }
    }

    pub fn library(&self) -> PathBuf {
        self.dir.path().join("data/tranche/kernels")
    }
}

fn ends_well(mut command: Command) -> Ended {
    Running::start(&mut command).wait(LIMIT).expect_code(0)
}

#[test]
fn an_imported_kernel_boots_by_name_until_it_is_removed() {
    let home = Home::new();
    let package = Package::of_kernel().save(home.dir.path());
    assert_eq!(ends_well(home.tranche(&["kernel", "ls", "-q"])).output, "");
    ends_well(home.import(&package, "mine"));
    // The package is not needed any more.
    std::fs::remove_file(package).unwrap();
    let ended = ends_well(home.tranche(&["run", "--kernel", "mine"]));
    assert!(ended.output.ends_with("\nend\n"), "{}", ended.output);

    assert_eq!(ends_well(home.tranche(&["kernel", "ls", "-q"])).output, "mine\n");
    let table = ends_well(home.tranche(&["kernel", "ls"])).output;
    assert!(table.lines().count() == 2 && table.contains("mine") && table.contains("test"), "{table}");
    let json = ends_well(home.tranche(&["kernel", "ls", "--format", "json"])).output;
    assert!(json.contains("\"name\": \"mine\"") && json.contains("\"release\": \"test\""), "{json}");

    ends_well(home.tranche(&["kernel", "rm", "mine"]));
    assert_eq!(home.kept(), [""; 0]);
    expect_mistake(&mut home.tranche(&["run", "--kernel", "mine"]), 20, &["mine", "tranche kernel ls"]);
    expect_mistake(&mut home.tranche(&["kernel", "rm", "mine"]), 60, &["mine", "tranche kernel ls"]);
}

#[test]
fn a_file_is_named_by_its_path_where_an_imported_kernel_has_its_name() {
    let home = Home::new();
    ends_well(home.import(&Package::of_kernel().save(home.dir.path()), "both"));
    std::fs::write(home.dir.path().join("both"), "no kernel").unwrap();
    let run = |kernel: &str| {
        let mut command = home.tranche(&["run", "--kernel", kernel]);
        command.current_dir(home.dir.path());
        command
    };
    ends_well(run("both"));
    expect_mistake(&mut run("./both"), 21, &["./both"]);
}

#[test]
fn the_same_package_gives_the_same_initrd() {
    let home = Home::new();
    let package = Package::of_kernel_with("virtio_pci.ko\next4.ko\n");
    let package = package.module("virtio_blk", "depends=a,b\0").module("a", "depends=\0").module("b", "depends=a\0");
    let package = package.save(home.dir.path());
    let initrd = |name: &str| {
        ends_well(home.import(&package, name));
        std::fs::read(home.library().join(name).join("initrd")).unwrap()
    };
    assert!(initrd("one") == initrd("two"));
}

#[test]
fn names_that_are_none_or_taken() {
    let home = Home::new();
    let package = Package::of_kernel().save(home.dir.path());
    for name in ["", ".hidden", "..", "a/b", "../up", "Upper", &"a".repeat(65)] {
        expect_mistake(&mut home.import(&package, name), 2, &[&format!("'{name}'")]);
    }
    assert_eq!(home.kept(), [""; 0]);
    ends_well(home.import(&package, "mine"));
    expect_mistake(&mut home.import(&package, "mine"), 61, &["mine", "--force"]);
    let mut again = home.import(&package, "mine");
    again.arg("--force");
    ends_well(again);
    assert_eq!(home.kept(), ["mine"]);
}

#[test]
fn sources_that_are_no_kernel_package() {
    let home = Home::new();
    let file = |bytes: &[u8]| save(home.dir.path(), bytes);
    expect_mistake(&mut home.import(Path::new("/no/such.deb"), "k"), 62, &["/no/such.deb", "No such file"]);
    expect_mistake(&mut home.import(&file(b""), "k"), 63, &["package.deb"]);
    expect_mistake(&mut home.import(&file(b"\xed\xab\xee\xdb rpm"), "k"), 63, &["RPM", "unpack it"]);
    expect_mistake(&mut home.import(&file(b"\x28\xb5\x2f\xfd pacman"), "k"), 63, &["unpack it"]);
    expect_mistake(&mut home.import(&Package::new().save(home.dir.path()), "k"), 63, &["no kernel"]);
    expect_mistake(&mut home.import(&empty(&home), "k"), 63, &["no kernel"]);
    assert_eq!(home.kept(), [""; 0]);
}

fn empty(home: &Home) -> PathBuf {
    let dir = home.dir.path().join("empty");
    std::fs::create_dir(&dir).unwrap();
    dir
}

#[test]
fn a_directory_with_several_kernels() {
    let home = Home::new();
    let tree = home.dir.path().join("tree");
    for release in ["6.1", "6.12"] {
        std::fs::create_dir_all(tree.join("usr/lib/modules").join(release)).unwrap();
        std::fs::create_dir_all(tree.join("boot")).unwrap();
        std::fs::copy(crate::support::guests().join("hello"), tree.join(format!("boot/vmlinuz-{release}"))).unwrap();
        let builtin = tree.join("usr/lib/modules").join(release).join("modules.builtin");
        std::fs::write(builtin, crate::package::ALL_BUILT_IN).unwrap();
    }
    expect_mistake(&mut home.import(&tree, "k"), 63, &["6.1, 6.12", "--release"]);
    let chosen = |release: &str| {
        let mut command = home.import(&tree, "k");
        command.args(["--release", release]);
        command
    };
    expect_mistake(&mut chosen("5.10"), 63, &["5.10", "6.12"]);
    ends_well(chosen("6.1"));
    ends_well(home.tranche(&["run", "--kernel", "k"]));
}

#[test]
fn kernels_that_could_start_no_guest() {
    let home = Home::new();
    for (builtin, word) in [
        ("virtio_blk.ko\next4.ko\n", "PCI"),
        ("virtio_pci.ko\next4.ko\n", "disks"),
        ("virtio_pci.ko\nvirtio_blk.ko\n", "root"),
    ] {
        let package = Package::of_kernel_with(builtin).save(home.dir.path());
        expect_mistake(&mut home.import(&package, "k"), 63, &[word]);
    }
    assert_eq!(home.kept(), [""; 0]);
}

#[test]
fn a_full_disk_keeps_what_was_there_and_nothing_half_made() {
    if !is_root("a full disk") {
        return;
    }
    let home = Home::new();
    let package = Package::of_kernel().file("boot/vmlinuz-other", &[0; 1 << 20]).save(home.dir.path());
    let mut import = home.import(&package, "k");
    import.env("XDG_DATA_HOME", "/mnt");
    let script = "mount -t tmpfs -o size=64k none /mnt";
    expect_mistake(&mut after_script(script, &import), 64, &["/mnt/tranche/kernels", "No space"]);
    let look = format!("{script}\n\"$0\" \"$@\" || true\nls -A /mnt/tranche/kernels\nexit 0\n:");
    let ended = Running::start(&mut after_script(&look, &import)).wait(LIMIT).expect_code(0);
    assert_eq!(ended.output, "", "nothing is left");
}

#[test]
fn a_library_that_cannot_be_written() {
    let home = Home::new();
    let package = Package::of_kernel().save(home.dir.path());
    // A file where the directory would be: this stops root, too.
    std::fs::write(home.dir.path().join("data"), "").unwrap();
    expect_mistake(&mut home.import(&package, "k"), 64, &["data/tranche/kernels"]);
}

#[test]
fn a_killed_import_is_swept_by_the_next() {
    let home = Home::new();
    let package = Package::of_kernel().save(home.dir.path());
    let left = home.library().join(".new-k-1/unpacked");
    std::fs::create_dir_all(left).unwrap();
    assert_eq!(ends_well(home.tranche(&["kernel", "ls", "-q"])).output, "");
    ends_well(home.import(&package, "k"));
    assert_eq!(home.kept(), ["k"]);
}

#[test]
fn a_damaged_bundle_is_named_and_does_not_hide_the_others() {
    let home = Home::new();
    let package = Package::of_kernel().save(home.dir.path());
    ends_well(home.import(&package, "good"));
    ends_well(home.import(&package, "bad"));
    std::fs::write(home.library().join("bad/manifest.json"), "{").unwrap();
    expect_mistake(&mut home.tranche(&["run", "--kernel", "bad"]), 65, &["bad", "tranche kernel rm bad"]);
    let ended = Running::start(&mut home.tranche(&["kernel", "ls", "-q"])).wait(LIMIT);
    assert_eq!(ended.output, "good\n");
    assert!(ended.errors.contains("bad"), "{}", ended.errors);
    ends_well(home.tranche(&["kernel", "rm", "bad"]));
    assert_eq!(home.kept(), ["good"]);
}
