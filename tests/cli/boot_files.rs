//! Kernels, initrds and command lines that cannot be booted: exit codes 20 to 26.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use tempfile::{TempDir, tempdir};

use crate::mistake::{LIMIT, expect_mistake, is_root, run, run_kernel};
use crate::support::nobody::Nobody;
use crate::support::{Running, guests};

fn file(dir: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("file");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The head of a bzImage of boot protocol 2.15: a payload of `payload` bytes behind one setup sector.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A guest packed as Linux's build does it; the size that goes behind the payload is gzip's own.
pub fn packed_guest(name: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&std::fs::read(guests().join(name)).unwrap()).unwrap();
    bzimage(&encoder.finish().unwrap())
}

#[test]
fn a_kernel_that_cannot_be_read() {
    expect_mistake(&mut run_kernel("/no/such/kernel"), 20, &["/no/such/kernel", "No such file", "--kernel"]);
    expect_mistake(&mut run_kernel("/"), 20, &["the kernel /", "not a regular file"]);
    expect_mistake(&mut run_kernel("/dev/zero"), 20, &["/dev/zero", "not a regular file"]);
}

#[test]
fn a_file_that_is_no_kernel() {
    let dir = tempdir().unwrap();
    for bytes in [&b""[..], b"#!/bin/sh\necho hello\n", &[0; 5000], b"\x7fELF"] {
        let code = if bytes.starts_with(b"\x7f") { 22 } else { 21 };
        expect_mistake(&mut run_kernel(file(&dir, bytes)), code, &["file"]);
    }
    expect_mistake(
        &mut run_kernel("/etc/passwd"),
        21,
        &["/etc/passwd", "neither an ELF file nor a bzImage", "vmlinuz"],
    );
    for program in ["/bin/ls", "/bin/sh", env!("CARGO_BIN_EXE_tranche")] {
        expect_mistake(&mut run_kernel(program), 21, &[program, "program or library for a running system"]);
    }
}

/// Lengths that cut a file everywhere near its start, and here and there behind.
fn cuts(len: usize) -> impl Iterator<Item = usize> {
    (1..700).step_by(23).chain((700..len).step_by(len / 12)).chain([len - 1]).filter(move |&cut| cut < len)
}

#[test]
fn a_kernel_cut_short_anywhere_is_damaged_or_none() {
    let dir = tempdir().unwrap();
    for (whole, magic) in [
        (std::fs::read(guests().join("hello")).unwrap(), 4),
        (std::fs::read(guests().join("hello-pvh")).unwrap(), 4),
        // Before its protocol version is there, nothing tells what the file is.
        (packed_guest("hello"), 0x208),
    ] {
        let path = file(&dir, &whole);
        Running::start(&mut run_kernel(&path)).wait(LIMIT).expect_code(0);
        // An ELF's section headers lie at the end of the file and are not needed.
        let needed = if magic == 4 { loaded_bytes(&whole) } else { whole.len() };
        for cut in cuts(needed) {
            let path = file(&dir, &whole[..cut]);
            let ended = Running::start(&mut run_kernel(&path)).wait(LIMIT);
            let code = ended.status.code();
            let expected = if cut < magic { 21 } else { 22 };
            assert_eq!(code, Some(expected), "cut at {cut}: {ended:?}");
            assert!(ended.errors.contains("file") && ended.errors.lines().count() <= 3, "{}", ended.errors);
        }
    }
}

/// How far into an ELF its segments reach.
fn loaded_bytes(elf: &[u8]) -> usize {
    let number = |at: usize, len: usize| elf[at..at + len].iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte));
    let (table, count) = (number(32, 8), number(56, 2));
    (0..count).map(|i| table + i * 56).map(|at| number(at + 8, 8) + number(at + 32, 8)).max().unwrap()
}

#[test]
fn a_kernel_or_initrd_larger_than_the_memory() {
    let dir = tempdir().unwrap();
    // The guest with a bss of 200 MiB: the size in memory of its second segment.
    let mut elf = std::fs::read(guests().join("hello")).unwrap();
    elf[64 + 56 + 40..][..8].copy_from_slice(&(200u64 << 20).to_le_bytes());
    let large = file(&dir, &elf);
    expect_mistake(run_kernel(&large).args(["--memory", "128M"]), 23, &["128 MiB", "at least 210 MiB", "--memory"]);
    Running::start(run_kernel(&large).args(["--memory", "210M"])).wait(LIMIT).expect_code(0);
    // One that has to lie in the gap.
    elf[64 + 56 + 24..][..8].copy_from_slice(&(3u64 << 30).to_le_bytes());
    elf[64 + 56 + 40..][..8].copy_from_slice(&(1u64 << 20).to_le_bytes());
    expect_mistake(run_kernel(file(&dir, &elf)).args(["--memory", "8G"]), 23, &["no amount of memory", "linked"]);

    let initrd = dir.path().join("initrd");
    let sparse = |bytes| File::create(&initrd).unwrap().set_len(bytes).unwrap();
    sparse(500 << 20);
    expect_mistake(run().arg("--initrd").arg(&initrd), 25, &["initrd", "256 MiB", "at least 510 MiB", "--memory"]);
    sparse(4 << 30);
    expect_mistake(
        run().args(["--memory", "8G", "--initrd"]).arg(&initrd),
        25,
        &["no amount of memory", "give a smaller initrd"],
    );
}

#[test]
fn an_initrd_that_is_none() {
    let dir = tempdir().unwrap();
    expect_mistake(run().args(["--initrd", "/no/such/initrd"]), 24, &["/no/such/initrd", "No such file", "--initrd"]);
    expect_mistake(run().args(["--initrd", "/"]), 24, &["not a regular file"]);
    expect_mistake(run().arg("--initrd").arg(file(&dir, b"")), 24, &["file is empty"]);
}

#[test]
fn a_command_line_that_the_kernel_does_not_take() {
    let long = "y".repeat(2048 - "console=ttyS0 panic=1 ".len());
    expect_mistake(run().args(["--cmdline", &long]), 26, &["2048 bytes", "at most 2047", "--cmdline"]);
    expect_mistake(run().args(["--cmdline", &"y".repeat(100_000)]), 26, &["at most 2047"]);
    for text in ["a\nb", "a\rb", "\n"] {
        expect_mistake(run().args(["--cmdline", text]), 26, &["a line break", "--cmdline"]);
    }
}

#[test]
fn files_of_another_user() {
    if !is_root("files that cannot be read") {
        return;
    }
    let nobody = Nobody::new();
    let path = nobody.private_file();
    expect_mistake(&mut nobody.run_kernel(&path, &[]), 20, &["Permission denied", "permissions"]);
    expect_mistake(nobody.run(&[]).arg("--initrd").arg(&path), 24, &["Permission denied", "permissions"]);
}

/// A panic of ours would end the program with another code.
#[test]
fn an_error_that_nobody_can_read_still_has_its_exit_code() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_tranche"))
        .args(["run", "--serial", "null", "--kernel", "/no/such/kernel"])
        .stderr(full)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(20));
}
