//! Packages made to harm whoever imports them: refused with a message, in bounded memory, and nothing is left.

use std::ffi::CString;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use crate::kernels::Home;
use crate::mistake::{LIMIT, expect_mistake, names};
use crate::package::{ALL_BUILT_IN, LONG_NAME, Package, REGULAR, deb, module, save};
use crate::support::{Running, guests};

/// Bytes of address space that an import gets here, far more than it needs.
const MEMORY: u64 = 1 << 30;

/// The import of a package into an empty library, with little memory.
fn import(home: &Home, source: &Path) -> Command {
    let command = home.import(source, "k");
    let mut limited = Command::new("prlimit");
    limited.arg(format!("--as={MEMORY}")).arg(command.get_program()).args(command.get_args());
    command.get_envs().for_each(|(name, value)| {
        limited.env(name, value.unwrap_or_default());
    });
    limited
}

#[track_caller]
fn refused(package: Package, words: &[&str]) {
    let home = Home::new();
    let package = package.save(home.dir.path());
    expect_mistake(&mut import(&home, &package), 63, words);
    assert_eq!(home.kept(), [""; 0], "nothing is left");
    let errors = Running::start(&mut import(&home, &package)).wait(LIMIT).errors;
    assert!(!errors.contains("out of memory"), "its own limit, not the machine's: {errors}");
}

#[test]
fn paths_that_lead_elsewhere_are_not_followed() {
    let home = Home::new();
    let package = Package::of_kernel()
        .file("../../boot/vmlinuz-out", b"x")
        .file("/tmp/boot/vmlinuz-out", b"x")
        .file("boot/../../vmlinuz-out", b"x")
        // A link out of the tree, and a file behind it.
        .entry(b'2', "lib/modules/test/kernel", 0, io::empty())
        .file("lib/modules/test/kernel/a.ko", &module("depends=\0"))
        .save(home.dir.path());
    Running::start(&mut import(&home, &package)).wait(LIMIT).expect_code(0);
    assert_eq!(home.kept(), ["k"]);
    assert_eq!(names(&home.library().join("k")), ["initrd", "kernel", "manifest.json"]);
    assert_eq!(names(home.dir.path()), ["data", "package.deb"]);
}

#[test]
fn a_name_of_two_gigabytes() {
    let package = Package::of_kernel().entry(LONG_NAME, "././@LongLink", 2 << 30, io::repeat(b'a'));
    refused(package.file("short", b""), &["package.deb"]);
}

#[test]
fn extensions_of_two_gigabytes() {
    refused(Package::of_kernel().entry(b'x', "pax", 2 << 30, io::repeat(b'a')).file("short", b""), &["package.deb"]);
}

#[test]
fn a_list_of_64_megabytes() {
    let list = Package::new().file("boot/vmlinuz-test", &std::fs::read(guests().join("hello")).unwrap());
    let list = list.entry(REGULAR, "lib/modules/test/modules.builtin", 64 << 20, io::repeat(b'\n'));
    refused(list, &["modules.builtin"]);
}

/// An XZ stream whose only block asks for 4 GiB of history ("The .xz File Format", section 5.3.1).
#[test]
fn a_history_of_four_gigabytes() {
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
    xz.write_all(&[0; 10240]).unwrap();
    let mut stream = xz.finish().unwrap();
    let end = 12 + (usize::from(stream[12]) + 1) * 4 - 4;
    let at = stream[12..end].windows(2).position(|filter| filter == [0x21, 1]).expect("an LZMA2 filter") + 12;
    stream[at + 2] = 40;
    let mut crc = flate2::Crc::new();
    crc.update(&stream[12..end]);
    stream[end..end + 4].copy_from_slice(&crc.sum().to_le_bytes());

    let home = Home::new();
    let package = save(home.dir.path(), &deb("data.tar.xz", &stream));
    expect_mistake(&mut import(&home, &package), 63, &["package.deb"]);
    assert_eq!(home.kept(), [""; 0]);
}

#[test]
fn modules_that_need_each_other_without_end() {
    const LENGTH: usize = 20_000;
    let mut package = Package::of_kernel_with("virtio_pci.ko\next4.ko\n").module("virtio_blk", "depends=m0\0");
    for i in 0..LENGTH {
        package = package.module(&format!("m{i}"), &format!("depends=m{}\0", (i + 1) % LENGTH));
    }
    refused(package, &["modules"]);
}

#[test]
fn modules_that_are_more_than_memory_holds() {
    let needs: Vec<_> = (0..20).map(|i| format!("m{i}")).collect();
    let package = Package::of_kernel_with("virtio_pci.ko\next4.ko\n");
    let mut package = package.module("virtio_blk", &format!("depends={}\0", needs.join(",")));
    let mut large = module("depends=\0");
    large.resize(60 << 20, 0);
    for name in needs {
        package = package.module_of(&name, &large);
    }
    refused(package, &["modules"]);
}

#[test]
fn directories_deeper_than_can_be_removed() {
    let deep = format!("lib/modules/test/{}a.ko", "d/".repeat(1500));
    refused(Package::of_kernel().file_far_down(&deep, b"x"), &["package.deb"]);
}

#[test]
fn a_file_that_is_a_directory_too() {
    let package = Package::of_kernel().file("lib/modules/test/a.ko", b"x").file("lib/modules/test/a.ko/b.ko", b"x");
    refused(package, &["package.deb"]);
}

#[test]
fn a_name_longer_than_any_file_has() {
    let long = format!("lib/modules/test/{}.ko", "a".repeat(300));
    refused(Package::of_kernel().file_far_down(&long, b"x"), &["package.deb"]);
}

#[test]
fn a_release_that_writes_on_the_terminal() {
    let home = Home::new();
    let kernel = std::fs::read(guests().join("hello")).unwrap();
    let release = "\x1b[2Jevil";
    let package = Package::new().file(&format!("boot/vmlinuz-{release}"), &kernel);
    let package = package.file(&format!("lib/modules/{release}/modules.builtin"), ALL_BUILT_IN.as_bytes());
    let ended = Running::start(&mut import(&home, &package.save(home.dir.path()))).wait(LIMIT);
    let listed = Running::start(&mut home.tranche(&["kernel", "ls"])).wait(LIMIT);
    for text in [&ended.output, &ended.errors, &listed.output, &listed.errors] {
        assert!(!text.contains('\x1b'), "{text:?}");
    }
    assert_eq!(ended.expect_code(63).output, "");
}

#[test]
fn a_package_that_ends_early() {
    let home = Home::new();
    let whole = Package::of_kernel().bytes();
    for part in 0..12 {
        let package = save(home.dir.path(), &whole[..whole.len() * part / 12]);
        expect_mistake(&mut import(&home, &package), 63, &["package.deb"]);
        assert_eq!(home.kept(), [""; 0], "{part}");
    }
}

/// A directory is not copied, so what lies in it is opened where it is.
#[test]
fn a_directory_of_files_that_are_none() {
    let home = Home::new();
    let tree = home.dir.path().join("tree");
    let modules = tree.join("lib/modules/test");
    let kernel = tree.join("boot/vmlinuz-test");
    std::fs::create_dir_all(&modules).unwrap();
    std::fs::create_dir_all(tree.join("boot")).unwrap();
    let pipe = |path: &Path| {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    };
    pipe(&kernel);
    std::fs::write(modules.join("modules.builtin"), ALL_BUILT_IN).unwrap();
    expect_mistake(&mut import(&home, &tree), 62, &["boot/vmlinuz-test", "not a regular file"]);

    std::fs::remove_file(&kernel).unwrap();
    std::fs::copy(guests().join("hello"), &kernel).unwrap();
    std::fs::remove_file(modules.join("modules.builtin")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", modules.join("modules.builtin")).unwrap();
    expect_mistake(&mut import(&home, &tree), 63, &["modules.builtin"]);
    assert_eq!(home.kept(), [""; 0]);
}
