//! qcow2 disks against a model, against QEMU's tools, and against images that lie.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::header::read_padded;
use super::*;
use crate::backend::OpenDirectly;
use crate::backend::disk::Disk;
use crate::backend::disk::tests::STARTING_PROGRAMS;
use crate::backend::disk::tools::create;
use crate::config::Image;
use crate::memory::{Ram, anonymous};

const MIB: u64 = 1 << 20;

fn qcow2(backing: &[Backing]) -> Image {
    Image { format: Some(DiskFormat::Qcow2), backing: backing.to_vec() }
}

fn try_open(path: &Path, read_only: bool, backing: &[Backing]) -> Result<Disk, DiskError> {
    Disk::open_image(&OpenDirectly, path, read_only, &qcow2(backing))
}

/// A program that another test starts has our locks too, for a moment: they are not held against us.
fn open(path: &Path, read_only: bool, backing: &[Backing]) -> Result<Disk, DiskError> {
    for _ in 0..1000 {
        match try_open(path, read_only, backing) {
            Err(DiskError::Locked { .. }) => std::thread::sleep(std::time::Duration::from_millis(5)),
            result => return result,
        }
    }
    try_open(path, read_only, backing)
}

/// Runs qemu-img; none, with a word about it, where there is no such program.
fn qemu_img(args: &[&str]) -> Option<String> {
    let alone = STARTING_PROGRAMS.write().unwrap_or_else(PoisonError::into_inner);
    match Command::new("qemu-img").args(args).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            // How hard a key is to guess it finds out by the clock, and on a busy machine it gives up at times.
            if text.contains("Unable to get accurate CPU usage") {
                drop(alone);
                return qemu_img(args);
            }
            assert!(output.status.success(), "qemu-img {args:?}:\n{text}");
            Some(text)
        }
        Err(error) => {
            eprintln!("*** NOT TESTED: images as QEMU sees them, as qemu-img cannot be run: {error}");
            None
        }
    }
}

#[track_caller]
fn expect_sound(path: &Path) {
    let text = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(text.is_none_or(|text| text.contains("No errors were found")), "qemu-img check finds fault");
}

/// A disk, driven as a device does it.
struct Driven {
    disk: Disk,
    ram: Ram,
}

impl Driven {
    fn new(disk: Disk) -> Self {
        Self { disk, ram: anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap() }
    }

    fn buf(&self, len: usize) -> IoBuf {
        let mut buf = IoBuf::new(self.ram.clone());
        // In two parts that do not end where clusters or chunks do.
        let first = len.min(1000);
        buf.push(0, first as u32).unwrap();
        buf.push(MIB, (len - first) as u32).unwrap();
        buf
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut buf = self.buf(bytes.len());
        buf.copy_from(bytes);
        self.disk.write(&mut buf, offset, None)
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let buf = self.buf(len);
        self.disk.read(&mut self.buf(len), offset, None)?;
        let mut bytes = vec![0; len];
        buf.copy_to(&mut bytes);
        Ok(bytes)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Reopen,
    /// The process is killed; what was flushed before has to be there.
    Kill,
}

fn steps(sectors: u64) -> impl Strategy<Value = Vec<Step>> {
    let range = (0..sectors, 1..600u64).prop_map(move |(at, len)| (at * SECTOR, len.min(sectors - at) * SECTOR));
    let step = prop_oneof![
        6 => (range.clone(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len as usize, byte)),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero(at, len, unmap)),
        2 => range.prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Kill),
    ];
    proptest::collection::vec(step, 1..30)
}

/// A raw file of `bytes`, each sector different, as something to be behind an image.
fn base(dir: &TempDir, bytes: u64) -> (PathBuf, Vec<u8>) {
    let path = dir.path().join("base");
    let contents: Vec<u8> = (0..bytes).map(|i| (i / SECTOR * 31 + i) as u8).collect();
    std::fs::write(&path, &contents).unwrap();
    (path, contents)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// The disk is as long as two and a half clusters more than what is behind it.
    #[test]
    fn a_disk_is_what_was_written(steps in steps(2 * MIB / SECTOR + 320)) {
        let dir = tempfile::tempdir().unwrap();
        let (base, mut model) = base(&dir, 2 * MIB);
        let behind = [Backing { path: base.clone(), format: Some(DiskFormat::Raw) }];
        let mut path = dir.path().join("image");
        let size = 2 * MIB + 320 * SECTOR;
        create(&path, Some(size), DiskFormat::Qcow2, Some(&behind[0]), false).unwrap();
        model.resize(size as usize, 0);
        let mut driven = Driven::new(open(&path, false, &behind).unwrap());
        for (step, n) in steps.into_iter().zip(0..) {
            match step {
                Step::Write(at, len, byte) => {
                    let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 7) as u8)).collect();
                    driven.write(at, &bytes).unwrap();
                    model[at as usize..][..len].copy_from_slice(&bytes);
                }
                Step::Zero(at, len, unmap) => {
                    driven.disk.write_zeroes(at, len, unmap).unwrap();
                    model[at as usize..][..len as usize].fill(0);
                }
                Step::Discard(at, len) => {
                    driven.disk.discard(at, len).unwrap();
                    model[at as usize..][..len as usize].fill(0);
                }
                Step::Flush => driven.disk.flush().unwrap(),
                Step::Reopen => {
                    drop(driven);
                    expect_sound(&path);
                    driven = Driven::new(open(&path, false, &behind).unwrap());
                }
                Step::Kill => {
                    driven.disk.flush().unwrap();
                    // A few more clusters, whose counts and tables are nowhere but in memory.
                    for at in (0..model.len() - 512).step_by(200_000) {
                        driven.write(at as u64, &model[at..at + 512]).unwrap();
                    }
                    let left = dir.path().join(format!("left{n}"));
                    std::fs::copy(&path, &left).unwrap();
                    path = left;
                    driven = Driven::new(open(&path, false, &behind).unwrap());
                }
            }
        }
        prop_assert_eq!(&driven.read(0, model.len()).unwrap(), &model);
        drop(driven);
        expect_sound(&path);
        let again = Driven::new(open(&path, true, &behind).unwrap());
        prop_assert_eq!(&again.read(0, model.len()).unwrap(), &model);
        let reference = dir.path().join("reference");
        std::fs::write(&reference, &model).unwrap();
        let name = |path: &Path| path.to_str().unwrap().to_owned();
        drop(again);
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &name(&path), &name(&reference)]);
        let (_, untouched) = self::base(&dir, 2 * MIB);
        prop_assert_eq!(std::fs::read(&base).unwrap(), untouched);
    }

    /// Whatever is in the image, it is refused, or gives errors, or works.
    #[test]
    fn damaged_images_do_no_harm(
        damage in proptest::collection::vec((0usize..40, any::<u16>(), any::<u8>(), any::<bool>()), 1..6),
        cut in proptest::option::weighted(0.2, 0u64..0x6_0000),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        create(&path, Some(8 * MIB), DiskFormat::Qcow2, None, false).unwrap();
        let driven = Driven::new(open(&path, false, &[]).unwrap());
        for at in [0, 3 * MIB, 8 * MIB - 4096] {
            driven.write(at, &[0x5a; 4096]).unwrap();
        }
        drop(driven);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        // Where the header, the tables and the counts are: all clusters but those of data.
        for (place, fine, byte, header) in damage {
            let at = if header { u64::from(fine) % 200 } else { place as u64 * 0x4000 + u64::from(fine) % 64 };
            if at < len {
                file.write_all_at(&[byte], at).unwrap();
            }
        }
        if let Some(cut) = cut {
            file.set_len(cut).unwrap();
        }
        for read_only in [true, false] {
            let Ok(disk) = open(&path, read_only, &[]) else { continue };
            if disk.bytes() < 8 * MIB {
                continue;
            }
            let driven = Driven::new(disk);
            for at in [0, 64 << 10, 3 * MIB, 8 * MIB - 4096] {
                let _ = driven.read(at, 4096);
                if !read_only {
                    let _ = driven.write(at, &[1; 512]);
                    let _ = driven.disk.discard(at, 4096);
                }
            }
            let _ = driven.disk.flush();
        }
    }
}

/// Makes an image with QEMU's tool out of a file whose middle is full.
fn made_by_qemu(dir: &TempDir, options: &[&str]) -> Option<(PathBuf, Vec<u8>)> {
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    let mut contents = vec![0; 3 << 20];
    for (i, byte) in contents[1 << 20..2 << 20].iter_mut().enumerate() {
        *byte = (i / 3) as u8;
    }
    std::fs::write(&raw, &contents).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
    args.extend(options);
    args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
    qemu_img(&args).map(|_| (image, contents))
}

#[test]
fn images_that_qemu_made() {
    for (options, writable) in [
        (&["-o", "compat=1.1"][..], true),
        (&["-c"], true),
        (&["-o", "compat=0.10"], false),
        (&["-c", "-o", "cluster_size=4096,refcount_bits=8"], true),
        (&["-o", "cluster_size=512,refcount_bits=1"], true),
        (&["-o", "cluster_size=2M,refcount_bits=64,lazy_refcounts=on"], true),
        (&["-o", "preallocation=metadata"], true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let Some((image, mut contents)) = made_by_qemu(&dir, options) else { return };
        let driven = Driven::new(open(&image, true, &[]).unwrap());
        assert_eq!(driven.read(0, contents.len()).unwrap(), contents, "{options:?}");
        drop(driven);
        match open(&image, false, &[]) {
            Ok(disk) => {
                assert!(writable, "{options:?}");
                let driven = Driven::new(disk);
                for at in [512, (1 << 20) + 512, (2 << 20) - 512, (3 << 20) - 1024] {
                    driven.write(at as u64, &[0xee; 1024]).unwrap();
                    contents[at..at + 1024].fill(0xee);
                }
                drop(driven);
                expect_sound(&image);
                let driven = Driven::new(open(&image, true, &[]).unwrap());
                assert_eq!(driven.read(0, contents.len()).unwrap(), contents, "{options:?}");
            }
            Err(error) => {
                assert!(!writable, "{options:?}: {error}");
                assert!(error.hint().unwrap().contains("read-only"), "{error}");
            }
        }
    }
}

#[test]
fn what_we_cannot_do_is_said() {
    for (options, says) in [
        (&["-o", "extended_l2=on"][..], "extended L2"),
        (&["-c", "-o", "compression_type=zstd"], "zlib"),
        (&["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s"], "encrypted"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let Some((image, _)) = made_by_qemu(&dir, options) else { return };
        let Err(DiskError::Image { source, .. }) = open(&image, true, &[]) else { panic!("{options:?}") };
        assert!(source.to_string().contains(says), "{source}");
    }
    let dir = tempfile::tempdir().unwrap();
    let Some((image, _)) = made_by_qemu(&dir, &[]) else { return };
    qemu_img(&["snapshot", "-c", "s", image.to_str().unwrap()]);
    drop(open(&image, true, &[]).unwrap());
    let Err(DiskError::Image { source, .. }) = open(&image, false, &[]) else { panic!("snapshots are not ours") };
    assert!(source.to_string().contains("snapshots"), "{source}");
}

#[test]
fn only_a_named_file_is_behind_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let (base, contents) = base(&dir, MIB);
    let (middle, top) = (dir.path().join("middle"), dir.path().join("top"));
    let raw = Backing { path: base, format: None };
    let over = Backing { path: middle.clone(), format: Some(DiskFormat::Qcow2) };
    create(&middle, None, DiskFormat::Qcow2, Some(&raw), false).unwrap();
    create(&top, Some(2 * MIB), DiskFormat::Qcow2, Some(&over), false).unwrap();
    let error = open(&top, false, &[]).unwrap_err();
    assert!(error.to_string().contains("it calls 'middle'"), "{error}");
    assert_eq!(error.hint().unwrap(), "add backing=PATH,backing-format=qcow2");
    assert!(matches!(open(&top, false, std::slice::from_ref(&over)), Err(DiskError::BackingNotNamed { .. })));
    let unsaid = Backing { format: None, ..over.clone() };
    assert!(matches!(open(&top, false, &[unsaid, raw.clone()]), Err(DiskError::BackingFormat { .. })));
    let chain = [over, raw.clone(), raw];
    assert!(matches!(open(&top, false, &chain), Err(DiskError::NoBacking { .. })));
    let driven = Driven::new(open(&top, false, &chain[..2]).unwrap());
    driven.write(4096, &[7; 512]).unwrap();
    let mut expected = contents;
    expected.resize(2 << 20, 0);
    expected[4096..4608].fill(7);
    assert_eq!(driven.read(0, 2 << 20).unwrap(), expected);
    // What is behind it is shared with readers, and locked against writers.
    assert!(matches!(try_open(&middle, false, &chain[1..2]), Err(DiskError::Locked { read_only: false, .. })));
    drop(open(&middle, true, &chain[1..2]).unwrap());
    // An image behind itself has two users.
    assert!(matches!(
        try_open(&middle, false, &[Backing { path: middle.clone(), format: Some(DiskFormat::Qcow2) }]),
        Err(DiskError::Locked { .. })
    ));
}

#[test]
fn a_format_is_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, Some(MIB), DiskFormat::Qcow2, None, false).unwrap();
    let as_format = |format| Disk::open_image(&OpenDirectly, &path, true, &Image { format, backing: Vec::new() });
    assert!(matches!(as_format(None), Err(DiskError::LooksLikeQcow2 { .. })));
    assert_eq!(as_format(Some(DiskFormat::Raw)).unwrap().bytes(), std::fs::metadata(&path).unwrap().len());
    std::fs::write(&path, vec![0; 4096]).unwrap();
    assert_eq!(as_format(None).unwrap().bytes(), 4096);
    assert!(matches!(as_format(Some(DiskFormat::Qcow2)), Err(DiskError::Image { source: ImageError::NotQcow2, .. })));
}

#[test]
fn a_closed_disk_is_at_rest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, Some(MIB), DiskFormat::Qcow2, None, false).unwrap();
    let dirty = || Header::read(&File::open(&path).unwrap(), std::fs::metadata(&path).unwrap().len()).unwrap().dirty;
    let driven = Driven::new(open(&path, false, &[]).unwrap());
    assert!(!dirty(), "a disk that is only read stays as it is");
    driven.write(0, &[1; 512]).unwrap();
    assert!(dirty());
    let copy = dir.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    driven.disk.closer().unwrap().close();
    assert!(!dirty());
    assert!(driven.write(0, &[2; 512]).is_err() && driven.disk.flush().is_err(), "it is of no use any more");
    drop(driven);
    expect_sound(&path);
    // One that was never closed is put in order by its next writer; readers are told so.
    assert!(matches!(open(&copy, true, &[]), Err(DiskError::Image { source: ImageError::Dirty, .. })));
    drop(open(&copy, false, &[]).unwrap());
    drop(open(&copy, true, &[]).unwrap());
    expect_sound(&copy);
}

#[test]
fn gaps_in_the_counts_are_filled_before_they_are_worked_with() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, Some(MIB), DiskFormat::Qcow2, None, false).unwrap();
    let driven = Driven::new(open(&path, false, &[]).unwrap());
    driven.write(0, &[1; 512]).unwrap();
    drop(driven);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let size = || file.metadata().unwrap().len();
    let header = || Header::read(&file, size()).unwrap();
    let sound = || repair::counts_are_sound(&file, size(), &header()).unwrap();
    assert!(sound());
    // No block, or one that cannot be; and one behind a gap, or used twice. Each repair makes new tables.
    for case in 0..6 {
        let header = header();
        let whole = u64::from_be_bytes(*read_padded(&file, header.refcount_offset, 8).unwrap().first_chunk().unwrap());
        let far = (size() / header.cluster_size() + 1) * header.cluster_size();
        let entries = [[0, 0], [0, whole], [1, 0], [far, 0], [whole, whole], [whole, far]][case];
        file.write_all_at(entries.map(u64::to_be_bytes).as_flattened(), header.refcount_offset).unwrap();
        assert!(!sound(), "{entries:x?}");
        let driven = Driven::new(open(&path, false, &[]).unwrap());
        assert!(sound());
        driven.write(MIB / 2, &[2; 512]).unwrap();
        assert_eq!(driven.read(0, 512).unwrap(), [1; 512]);
        assert_eq!(driven.read(MIB / 2, 512).unwrap(), [2; 512]);
        drop(driven);
        expect_sound(&path);
    }
}

#[test]
fn a_disk_of_less_than_a_cluster_is_zeroed_by_writes() {
    const BYTES: u64 = 16 << 10;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, Some(BYTES), DiskFormat::Qcow2, None, false).unwrap();
    let driven = Driven::new(open(&path, false, &[]).unwrap());
    let zero: [fn(&Disk) -> io::Result<()>; 3] = [
        |disk| disk.discard(1024, 2048),
        |disk| disk.write_zeroes(1024, 2048, false),
        |disk| disk.write_zeroes(1024, 2048, true),
    ];
    for zero in zero {
        driven.write(0, &[3; BYTES as usize]).unwrap();
        zero(&driven.disk).unwrap();
        let mut expected = [3; BYTES as usize];
        expected[1024..3072].fill(0);
        assert!(driven.read(0, BYTES as usize).unwrap() == expected);
    }
    drop(driven);
    expect_sound(&path);
}
