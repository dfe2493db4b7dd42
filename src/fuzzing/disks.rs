//! Disks that may hold anything: as images that we read and write, and as what a guest looks for its root on.

use std::path::Path;

use vm_memory::GuestAddress;

use super::input::Input;
use super::memory_files::{MemoryFiles, empty, file, sparse};
use crate::backend::Disk;
use crate::backend::disk::SECTOR;
use crate::backend::disk::qcow2::Qcow2;
use crate::config::{Backing, DiskFormat, Image};
use crate::guest_init::cmdline::{Options, Root};
use crate::guest_init::{partitions, superblock};
use crate::memory::{IoBuf, anonymous};
use crate::resize::layout::Layout;

/// Bits of the first byte of an image's input.
pub mod image {
    pub const READ_ONLY: u8 = 1;
    /// It is given a backing file.
    pub const BACKED: u8 = 2;
    /// Whoever closed it is repaired after first.
    pub const REPAIR: u8 = 4;
}

const IMAGE: &str = "image.qcow2";
const BACKING: &str = "backing";

/// Opens a qcow2 image and uses the disk in it: [`image`] bits, then the file as [`sparse`] has it.
pub fn qcow2(input: &[u8]) {
    let _ = open_and_exercise(input);
}

/// `None` if it was not opened.
pub fn open_and_exercise(input: &[u8]) -> Option<()> {
    let mut input = Input(input);
    let bits = input.u8()?;
    let file = sparse(&mut input)?;
    let backing = empty();
    backing.set_len(1 << 20).expect("room for a file in memory");
    let files = MemoryFiles::default().with(IMAGE, file).with(BACKING, backing);
    let path = Path::new(IMAGE);
    if bits & image::REPAIR != 0 {
        let _ = Qcow2::repair(&files, path);
    }
    let behind = Backing { path: BACKING.into(), format: Some(DiskFormat::Raw) };
    let backing = if bits & image::BACKED != 0 { vec![behind] } else { Vec::new() };
    let options = Image { format: Some(DiskFormat::Qcow2), backing };
    let read_only = bits & image::READ_ONLY != 0;
    let disk = Disk::open_image(&files, path, read_only, &options).ok()?;
    exercise(&disk, read_only);
    if let Some(closer) = disk.closer() {
        closer.close();
    }
    Some(())
}

/// Reads, and changes if that is allowed, its start, its middle and its end. The host may refuse any of it.
fn exercise(disk: &Disk, read_only: bool) {
    const LEN: u64 = 8 * SECTOR;
    let ram = anonymous(&[(GuestAddress(0), LEN)]).expect("guest memory");
    let last = disk.bytes() - SECTOR;
    for at in [0, last / 2 / SECTOR * SECTOR, last] {
        let len = LEN.min(disk.bytes() - at);
        let buffer = || {
            let mut buffer = IoBuf::new(ram.clone());
            buffer.push(0, len as u32).expect("it is in memory");
            buffer
        };
        let _ = disk.read(&mut buffer(), at, None);
        if !read_only {
            let _ = disk.write(&mut buffer(), at, None);
            let _ = disk.read(&mut buffer(), at, None);
            let _ = disk.write_zeroes(at, len, false);
            let _ = disk.discard(at, len);
        }
    }
    let _ = disk.flush();
}

/// What a guest's init looks at to find its root: the kernel's command line in a text of 16 bits of length, then a
/// disk as [`sparse`] has it.
pub fn root(input: &[u8]) {
    let mut input = Input(input);
    let Some(len) = input.u16() else { return };
    let line = String::from_utf8_lossy(input.up_to(len.into()));
    let options = Options::parse(&line);
    if let Some(root) = &options.root {
        let _ = Root::parse(root);
    }
    let Some(disk) = sparse(&mut input) else { return };
    for sector in [512, 4096] {
        for number in [0, 1, 2, 128, u32::MAX] {
            let _ = partitions::names(&disk, sector, number);
        }
    }
    let len = disk.metadata().map_or(0, |metadata| metadata.len()).min(superblock::PROBED as u64);
    let mut start = vec![0; len as usize];
    partitions::Read::read_at(&disk, 0, &mut start).expect("the file is as long as it says");
    if let Some(found) = superblock::probe(&start) {
        assert!(found.uuid.is_none_or(|uuid| uuid.len() == 36));
    }
}

/// What is on a disk that is to get another size: the input is the disk, whose partition table has its checksums mended, as
/// nobody finds them by chance.
pub fn layout(input: &[u8]) {
    let mut bytes = input.to_vec();
    let _ = mend_table(&mut bytes);
    let (disk, size) = (file(&bytes), bytes.len() as u64);
    let Ok(Layout { table: Some(table), .. }) = Layout::of(&disk, size) else { return };
    for size in [size / 2, size, size * 2] {
        if let Ok(resized) = table.resized(size) {
            disk.set_len(size.max(bytes.len() as u64)).expect("a file in memory grows");
            resized.write(&disk).expect("a file in memory is written to");
            assert!(disk.metadata().is_ok_and(|is| is.len() == size.max(bytes.len() as u64)), "behind its end");
        }
    }
}

/// Makes the checksums of a GPT right, as far as there is one.
fn mend_table(bytes: &mut [u8]) -> Option<()> {
    let word = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize);
    let entries = word(bytes, 512 + 80)?.checked_mul(word(bytes, 512 + 84)?)?;
    let at = word(bytes, 512 + 72)?.checked_mul(512)?;
    let crc = crc32fast::hash(bytes.get(at..at.checked_add(entries)?)?);
    bytes.get_mut(512 + 88..512 + 92)?.copy_from_slice(&crc.to_le_bytes());
    bytes.get_mut(512 + 16..512 + 20)?.fill(0);
    let crc = crc32fast::hash(bytes.get(512..512usize.checked_add(word(bytes, 512 + 12)?)?)?);
    bytes.get_mut(512 + 16..512 + 20)?.copy_from_slice(&crc.to_le_bytes());
    Some(())
}
