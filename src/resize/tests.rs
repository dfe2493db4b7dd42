//! Partition tables and superblocks as guests may have written them.

use std::fs::File;
use std::io::Write;

use proptest::prelude::*;

use super::gpt::{Gpt, GptError, SECTOR};
use super::layout::{Content, Layout};

const MIB: u64 = 1 << 20;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The first 2 MiB of a disk of `mib` MiB with two partitions, the second to the end, made after UEFI 2.10, 5.3.2 and 5.3.3.
pub(crate) fn disk(mib: u64) -> Vec<u8> {
    let sectors = mib * MIB / SECTOR;
    let mut bytes = vec![0; 2 * MIB as usize];
    bytes[450] = 0xee;
    put(&mut bytes, 510, &[0x55, 0xaa]);
    for (index, (first, last)) in [(2048, 2048 + 7), (3072, sectors - 34)].into_iter().enumerate() {
        let entry = 1024 + index * 128;
        bytes[entry] = 1;
        put(&mut bytes, entry + 32, &u64::to_le_bytes(first));
        put(&mut bytes, entry + 40, &u64::to_le_bytes(last));
    }
    let entries = crc32fast::hash(&bytes[1024..1024 + 128 * 128]);
    let header = &mut bytes[512..1024];
    put(header, 0, b"EFI PART");
    put(header, 8, &0x1_0000u32.to_le_bytes());
    put(header, 12, &92u32.to_le_bytes());
    for (at, value) in [(24, 1), (32, sectors - 1), (40, 34), (48, sectors - 34), (72, 2)] {
        put(header, at, &u64::to_le_bytes(value));
    }
    for (at, value) in [(80, 128), (84, 128), (88, entries)] {
        put(header, at, &u32::to_le_bytes(value));
    }
    seal(&mut bytes);
    bytes
}

/// Makes a header's checksum right.
fn seal(bytes: &mut [u8]) {
    put(bytes, 512 + 16, &[0; 4]);
    let len = u32::from_le_bytes(bytes[524..528].try_into().unwrap()).min(512) as usize;
    let crc = crc32fast::hash(&bytes[512..512 + len]);
    put(bytes, 512 + 16, &crc.to_le_bytes());
}

fn file(bytes: &[u8], size: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(size).unwrap();
    file
}

/// A superblock of `blocks` blocks of 4 KiB.
pub(crate) fn superblock(blocks: u32) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    put(&mut bytes, 4, &blocks.to_le_bytes());
    put(&mut bytes, 24, &2u32.to_le_bytes());
    put(&mut bytes, 56, &[0x53, 0xef]);
    bytes
}

#[test]
fn a_table_follows_its_disk() {
    let size = 64 * MIB;
    let disk = file(&disk(64), size);
    let table = Gpt::read(&disk, size).unwrap().unwrap();
    let part = table.last_partition().unwrap();
    assert_eq!((part.number, part.offset(), part.len()), (2, 3072 * 512, (131_072 - 33 - 3072) * 512));
    for mib in [100, 65, 64, 63, 10] {
        let before = disk.metadata().unwrap().len();
        let resized = Gpt::read(&disk, before).unwrap().unwrap().resized(mib * MIB).unwrap();
        disk.set_len(before.max(mib * MIB)).unwrap();
        resized.write(&disk).unwrap();
        disk.set_len(mib * MIB).unwrap();
        let again = Gpt::read(&disk, mib * MIB).unwrap().unwrap();
        assert_eq!(again, resized);
        let end = again.last_partition().unwrap().last + 1;
        // The copy has the last 33 sectors; partitions end at whole MiB before it.
        assert!(end <= mib * 2048 - 33 && end > mib * 2048 - 33 - 2048, "{mib} MiB: {end}");
    }
    assert!(matches!(table.resized(MIB), Err(GptError::NoRoom(at)) if at == 3072 * 512));
    assert!(matches!(table.resized(0), Err(GptError::NoRoom(_))));
    assert_eq!(Gpt::read(&file(&[], 0), 0).unwrap(), None);
}

#[test]
fn each_rule_of_a_table_has_its_error() {
    let size = 64 * MIB;
    let wrong = |change: &dyn Fn(&mut Vec<u8>), is_sealed: bool| {
        let mut bytes = disk(64);
        change(&mut bytes);
        if is_sealed {
            seal(&mut bytes);
        }
        match Gpt::read(&file(&bytes, size), size) {
            Err(GptError::Damaged(what)) => what,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(wrong(&|b| b[512 + 60] ^= 1, false), "the checksum of its header is wrong");
    for (at, bytes, what) in [
        (12, &[91u8, 0, 0, 0][..], "the length of its header makes no sense"),
        (12, &[0, 16, 0, 0], "the length of its header makes no sense"),
        (80, &[0, 0, 0, 0], "the number or length of its entries makes no sense"),
        (80, &[0xff; 8], "the number or length of its entries makes no sense"),
        (84, &[120, 0, 0, 0], "the number or length of its entries makes no sense"),
        (24, &[2], "it is not where it says it is"),
        (72, &[0xff; 8], "it is not where it says it is"),
        (72, &[1, 0, 0, 0], "it is not where it says it is"),
        (88, &[0], "the checksum of its entries is wrong"),
        (40, &[0xff; 8], "what it has for partitions is not on the disk"),
        (48, &[0xff; 8], "what it has for partitions is not on the disk"),
        (40, &[10, 0], "what it has for partitions is not on the disk"),
        (40, &[1, 8], "a partition is not on the disk"),
    ] {
        assert_eq!(wrong(&|b| put(b, 512 + at, bytes), true), what, "{at}: {bytes:?}");
    }
}

#[test]
fn what_fills_a_disk_is_known_by_its_marks() {
    let of = |at: usize, mark: &[u8]| {
        let mut bytes = vec![0; MIB as usize];
        put(&mut bytes, at, mark);
        Layout::of(&file(&bytes, MIB), MIB).unwrap().content
    };
    assert_eq!(of(0, &[]), Content::Unknown);
    assert_eq!(of(1024, &superblock(200)), Content::Ext { bytes: 200 * 4096, block_size: 4096 });
    let mut large = superblock(7);
    put(&mut large, 96, &0x80u32.to_le_bytes());
    put(&mut large, 0x150, &1u32.to_le_bytes());
    assert_eq!(of(1024, &large), Content::Ext { bytes: ((1 << 32) + 7) * 4096, block_size: 4096 });
    for block_log in [7u32, 64, u32::MAX] {
        let mut odd = superblock(7);
        put(&mut odd, 24, &block_log.to_le_bytes());
        assert_eq!(of(1024, &odd), Content::Unknown, "blocks of 2^{block_log} KiB");
    }
    for (at, mark, name) in [
        (0, &b"XFSB"[..], "XFS"),
        (0x1_0040, b"_BHRfS_M", "btrfs"),
        (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
        (512, b"LABELONE", "an LVM volume"),
        (4086, b"SWAPSPACE2", "swap space"),
    ] {
        assert_eq!(of(at, mark), Content::Other(name));
    }
    let mut dos = [0; 512];
    dos[450] = 0x83;
    put(&mut dos, 510, &[0x55, 0xaa]);
    assert_eq!(of(0, &dos), Content::Other("a DOS partition table"));
    // In a partition, from its beginning on.
    let mut whole = disk(64);
    whole.resize(4 * MIB as usize, 0);
    put(&mut whole, 3072 * 512 + 1024, &superblock(5));
    let layout = Layout::of(&file(&whole, 64 * MIB), 64 * MIB).unwrap();
    assert_eq!((layout.offset(), layout.content), (3072 * 512, Content::Ext { bytes: 5 * 4096, block_size: 4096 }));
}

proptest! {
    #[test]
    fn no_table_panics_or_leaves_its_disk(
        changes in proptest::collection::vec((0usize..512 + 3 * 128, any::<u8>()), 0..6),
        is_sealed: bool,
        mib in 1u64..80,
        to in 0u64..200 * MIB,
    ) {
        let mut bytes = disk(64);
        for (at, value) in changes {
            bytes[512 + at] = value;
        }
        if is_sealed {
            let crc = crc32fast::hash(&bytes[1024..1024 + 128 * 128]);
            put(&mut bytes, 512 + 88, &crc.to_le_bytes());
            seal(&mut bytes);
        }
        let size = mib * MIB;
        let disk = file(&bytes, size);
        if let Ok(Layout { table: Some(table), .. }) = Layout::of(&disk, size)
            && let Ok(resized) = table.resized(to)
        {
            disk.set_len(size.max(to)).unwrap();
            resized.write(&disk).unwrap();
            prop_assert_eq!(disk.metadata().unwrap().len(), size.max(to), "nothing is written behind the end");
        }
    }

    #[test]
    fn no_superblock_panics(bytes in proptest::collection::vec(any::<u8>(), 1024), size in 0u64..MIB) {
        let mut bytes = bytes;
        put(&mut bytes, 56, &[0x53, 0xef]);
        let disk = file(&[vec![0; 1024], bytes].concat(), size);
        let _ = Layout::of(&disk, size);
    }
}
