//! What the tools make, and what they leave alone.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::*;
use crate::backend::OpenDirectly;
use crate::backend::disk::Disk;
use crate::backend::disk::tests::STARTING_PROGRAMS;
use crate::config::{Backing, DiskFormat, Image};

const MIB: u64 = 1 << 20;

/// Not in /tmp, which may be a file system without holes.
fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap()
}

/// A raw disk with something in its middle, and nothing around it.
fn raw(dir: &Path) -> PathBuf {
    let path = dir.join("raw");
    create(&path, Some(8 * MIB), DiskFormat::Raw, None, false).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let contents: Vec<u8> = (0..MIB).map(|i| (i / 5) as u8).collect();
    file.write_all_at(&contents, 3 * MIB + 512).unwrap();
    path
}

fn convert_as(from: &Path, format: DiskFormat, to: &Path, to_format: DiskFormat, force: bool) -> Result<(), ToolError> {
    let image = Image { format: Some(format), backing: Vec::new() };
    convert(&Source { path: from, image: &image }, to, to_format, force, &mut |done, all| assert!(done <= all))
}

#[test]
fn copies_are_alike_and_sparse() {
    let _quiet = STARTING_PROGRAMS.read().unwrap_or_else(PoisonError::into_inner);
    let dir = dir();
    let raw = raw(dir.path());
    let (image, copy) = (dir.path().join("image"), dir.path().join("copy"));
    convert_as(&raw, DiskFormat::Raw, &image, DiskFormat::Qcow2, false).unwrap();
    assert!(std::fs::metadata(&image).unwrap().len() < 2 * MIB);
    convert_as(&image, DiskFormat::Qcow2, &copy, DiskFormat::Raw, false).unwrap();
    assert!(std::fs::read(&raw).unwrap() == std::fs::read(&copy).unwrap(), "the copy of the copy differs");
    assert!(std::fs::metadata(&copy).unwrap().blocks() * 512 < 2 * MIB, "zeroes take space");
    // Nothing else is left.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
}

#[test]
fn nothing_is_replaced_by_accident() {
    let _quiet = STARTING_PROGRAMS.read().unwrap_or_else(PoisonError::into_inner);
    let dir = dir();
    let raw = raw(dir.path());
    let precious = dir.path().join("precious");
    std::fs::write(&precious, "precious").unwrap();
    let exists = |result| matches!(result, Err(ToolError::Exists { .. }));
    assert!(exists(convert_as(&raw, DiskFormat::Raw, &precious, DiskFormat::Raw, false)));
    assert!(exists(create(&precious, Some(MIB), DiskFormat::Raw, None, false)));
    assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
    std::fs::write(&precious, [1; 512]).unwrap();
    let held = Disk::open(&OpenDirectly, &precious, true).unwrap();
    let locked = create(&precious, Some(MIB), DiskFormat::Raw, None, true);
    assert!(matches!(locked, Err(ToolError::Disk(DiskError::Locked { .. }))));
    drop(held);
    // A disk is not copied onto itself.
    let onto_itself = convert_as(&raw, DiskFormat::Raw, &raw, DiskFormat::Raw, true);
    assert!(matches!(onto_itself, Err(ToolError::Disk(DiskError::Locked { .. }))));
    create(&precious, Some(MIB), DiskFormat::Qcow2, None, true).unwrap();
    assert_eq!(info(&precious, DiskFormat::Qcow2).unwrap().size, MIB);
    // A source that cannot be read leaves nothing.
    let nothing = dir.path().join("nothing");
    assert!(convert_as(&raw, DiskFormat::Qcow2, &nothing, DiskFormat::Raw, false).is_err());
    assert!(!nothing.exists());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn sizes() {
    let _quiet = STARTING_PROGRAMS.read().unwrap_or_else(PoisonError::into_inner);
    let dir = dir();
    let raw = raw(dir.path());
    for size in [0, 511, 513, u64::MAX, 1 << 60] {
        assert!(matches!(resize(&raw, size, DiskFormat::Raw, &[], true), Err(ToolError::Size { .. })), "{size}");
    }
    assert_eq!(resize(&raw, 9 * MIB, DiskFormat::Raw, &[], false).unwrap(), 8 * MIB);
    assert!(matches!(resize(&raw, MIB, DiskFormat::Raw, &[], false), Err(ToolError::Shrink { .. })));
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 9 * MIB);
    resize(&raw, MIB, DiskFormat::Raw, &[], true).unwrap();
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), MIB);

    // What an image gains is zeroes, though there is more behind it.
    let base = dir.path().join("base");
    std::fs::write(&base, vec![9; 2 << 20]).unwrap();
    let image = dir.path().join("image");
    let behind = [Backing { path: base, format: Some(DiskFormat::Raw) }];
    create(&image, Some(MIB + 512), DiskFormat::Qcow2, Some(&behind[0]), false).unwrap();
    assert_eq!(resize(&image, 600 * MIB, DiskFormat::Qcow2, &behind, false).unwrap(), MIB + 512);
    assert!(matches!(resize(&image, MIB, DiskFormat::Qcow2, &behind, true), Err(ToolError::ShrinkQcow2)));
    let copy = dir.path().join("copy");
    let all = Image { format: Some(DiskFormat::Qcow2), backing: behind.to_vec() };
    convert(&Source { path: &image, image: &all }, &copy, DiskFormat::Raw, false, &mut |_, _| {}).unwrap();
    let file = std::fs::File::open(&copy).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 600 * MIB);
    let mut start = vec![0; 2 << 20];
    file.read_exact_at(&mut start, 0).unwrap();
    let data = start.iter().take_while(|&&byte| byte == 9).count();
    assert_eq!((data as u64, start[data..].iter().all(|&byte| byte == 0)), (MIB + 512, true));
}

#[test]
fn what_is_told() {
    let _quiet = STARTING_PROGRAMS.read().unwrap_or_else(PoisonError::into_inner);
    let dir = dir();
    let raw = raw(dir.path());
    let (middle, image) = (dir.path().join("middle"), dir.path().join("sub/image"));
    let behind = Backing { path: raw.clone(), format: Some(DiskFormat::Raw) };
    create(&middle, None, DiskFormat::Qcow2, Some(&behind), false).unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    create(&image, None, DiskFormat::Qcow2, Some(&behind), false).unwrap();
    let qcow2 = |path: &Path| info(path, DiskFormat::Qcow2).unwrap().qcow2.unwrap();
    assert_eq!(qcow2(&middle).backing.unwrap(), "raw", "beside it");
    assert_eq!(Path::new(&qcow2(&image).backing.unwrap()), raw.canonicalize().unwrap());
    assert_eq!(qcow2(&image).backing_format.unwrap(), "raw");
    let told = info(&image, DiskFormat::Raw).unwrap();
    assert!(told.looks_like_qcow2 && told.qcow2.is_none() && told.size != 8 * MIB);
    assert_eq!(info(&image, DiskFormat::Qcow2).unwrap().size, 8 * MIB);
    let told = |path: &Path| info(path, DiskFormat::Raw).unwrap().in_use;
    assert_eq!(told(&raw), Use::No);
    let reader = Disk::open(&OpenDirectly, &raw, true).unwrap();
    assert_eq!(told(&raw), Use::Reading);
    drop(reader);
    let _writer = Disk::open(&OpenDirectly, &raw, false).unwrap();
    assert_eq!(told(&raw), Use::Writing);
}
