use super::*;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::cpu::gdt;
use crate::memory::{Ram, anonymous};
use payload::tests::sample;
pub use payload::tests::{FORMATS, pack};

const MIB: u64 = 1 << 20;
const KERNEL: u64 = 16 * MIB;

/// A kernel of two segments at 16 MiB, the second with a bss, and a note if it has a PVH entry.
pub fn elf(code: &[u8], pvh: Option<u32>) -> Vec<u8> {
    let note = [
        &[4, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0][..],
        b"Xen\0lin\0",
        &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0],
        b"Xen\0",
        &pvh.unwrap_or(0).to_le_bytes(),
    ]
    .concat();
    let data_at = 0x1000 + code.len() as u64;
    let segments = [
        [1 | 5 << 32, 0x1000, 0xffff_ffff_8100_0000, KERNEL, code.len() as u64, code.len() as u64, 0x1000],
        [1 | 6 << 32, data_at, 0xffff_ffff_8200_0000, KERNEL + MIB, 16, 0x8000, 0x1000],
        [4, 0x200, 0, 0, note.len() as u64, note.len() as u64, 4],
    ];
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [KERNEL + 0x10, 64, 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for half in [0u16, 0, 64, 56, 2 + u16::from(pvh.is_some()), 0, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    bytes.extend(segments.iter().flatten().flat_map(|word| word.to_le_bytes()));
    bytes.resize(0x200, 0);
    bytes.extend_from_slice(&note);
    bytes.resize(0x1000, 0);
    bytes.extend_from_slice(code);
    bytes.extend_from_slice(b"initialized data");
    bytes
}

/// A bzImage of boot protocol 2.15 with one setup sector, its payload behind 1 KiB of its own code.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024 + 1024];
    bytes[1024..].fill(0x90);
    let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x236, &[1]);
    put(0x238, &100_u32.to_le_bytes());
    put(0x248, &1024_u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x250, &[0xff; 8]);
    put(0x258, &KERNEL.to_le_bytes());
    put(0x260, &(20 * MIB as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn file(bytes: &[u8]) -> BootFile {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    BootFile { file, path: "some/file".into() }
}

fn source(kernel: &[u8]) -> BootSource {
    BootSource { kernel: file(kernel), initrd: None, cmdline: "quiet".into(), rsdp: layout::ACPI }
}

fn with_initrd(kernel: &[u8], initrd: &[u8]) -> BootSource {
    BootSource { initrd: Some(file(initrd)), ..source(kernel) }
}

fn machine(mib: u64) -> Ram {
    anonymous(&layout::ram_ranges(mib * MIB)).unwrap()
}

fn boot(mib: u64, source: &BootSource) -> Result<(Ram, EntryPoint), BootError> {
    let ram = machine(mib);
    load(&ram, source, &KernelCache::off()).map(|entry| (ram, entry))
}

fn bytes_at(ram: &Ram, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
}

fn u32_at(ram: &Ram, addr: u64) -> u32 {
    ram.read_obj(GuestAddress(addr)).unwrap()
}

fn u64_at(ram: &Ram, addr: u64) -> u64 {
    ram.read_obj(GuestAddress(addr)).unwrap()
}

#[test]
fn an_elf_with_the_note_is_entered_by_pvh() {
    let code = sample(100_000);
    let (ram, entry) = boot(5120, &with_initrd(&elf(&code, Some(KERNEL as u32 + 0x850)), &[7; 5000])).unwrap();
    assert_eq!(entry, EntryPoint::Pvh { rip: KERNEL + 0x850, start_info: layout::PVH_INFO });
    assert!(bytes_at(&ram, KERNEL, code.len()) == code);
    assert_eq!(bytes_at(&ram, KERNEL + MIB, 17), b"initialized data\0");
    assert_eq!(bytes_at(&ram, layout::CMDLINE, 6), b"quiet\0");

    let info = layout::PVH_INFO;
    assert_eq!([u32_at(&ram, info), u32_at(&ram, info + 4), u32_at(&ram, info + 12)], [0x336e_c578, 1, 1]);
    assert_eq!([u64_at(&ram, info + 24), u64_at(&ram, info + 32)], [layout::CMDLINE, layout::ACPI]);
    let (module, map) = (u64_at(&ram, info + 16), u64_at(&ram, info + 40));
    // Right below the gap, in whole pages.
    assert_eq!([u64_at(&ram, module), u64_at(&ram, module + 8)], [layout::GAP_START - 0x2000, 5000]);
    assert_eq!(bytes_at(&ram, layout::GAP_START - 0x2000, 5000), [7; 5000]);
    let entries: Vec<_> = (0..u64::from(u32_at(&ram, info + 48)))
        .map(|i| (u64_at(&ram, map + i * 24), u64_at(&ram, map + i * 24 + 8), u32_at(&ram, map + i * 24 + 16)))
        .collect();
    assert_eq!(entries.len(), 5);
    assert_eq!(entries[2], (MIB, 3071 * MIB, 1));
    assert_eq!(entries[4], (4096 * MIB, 2048 * MIB, 1));
}

#[test]
fn an_elf_without_it_is_entered_in_long_mode() {
    let (ram, entry) = boot(64, &with_initrd(&elf(&sample(5000), None), &[7; 4096])).unwrap();
    assert_eq!(
        entry,
        EntryPoint::Linux64 {
            rip: KERNEL + 0x10,
            zero_page: layout::ZERO_PAGE,
            page_tables: layout::PAGE_TABLES,
            gdt: layout::GDT
        }
    );
    let zero_page = bytes_at(&ram, layout::ZERO_PAGE, 4096);
    let u32_of = |offset: usize| u32::from_le_bytes(*zero_page[offset..].first_chunk().unwrap());
    assert_eq!(&zero_page[0x1fe..0x200], [0x55, 0xaa]);
    assert_eq!(&zero_page[0x202..0x206], b"HdrS");
    assert_eq!(zero_page[0x210], 0xff);
    assert_eq!(u32_of(0x218), 64 * MIB as u32 - 4096);
    assert_eq!(u32_of(0x21c), 4096);
    assert_eq!(u32_of(0x228), layout::CMDLINE as u32);
    assert_eq!(u32_of(0x070), layout::ACPI as u32);
    assert_eq!(zero_page[0x1e8], 4);
    assert_eq!([u32_of(0x2d0 + 40), u32_of(0x2d0 + 48), u32_of(0x2d0 + 56)], [MIB as u32, 63 * MIB as u32, 1]);
    assert_eq!(u64_at(&ram, layout::PAGE_TABLES), layout::PAGE_TABLES + 0x1003);
    assert_eq!(u64_at(&ram, layout::GDT + 16), gdt::TABLE[2]);
}

#[test]
fn a_bzimage_is_entered_as_the_elf_inside() {
    let code = sample(200_000);
    for format in [Format::Gzip, Format::Xz, Format::Lz4, Format::Zstd, Format::Lzma, Format::Bzip2] {
        for pvh in [Some(KERNEL as u32), None] {
            let (ram, entry) = boot(64, &source(&bzimage(&pack(format, &elf(&code, pvh))))).unwrap();
            assert!(bytes_at(&ram, KERNEL, code.len()) == code, "{format:?}");
            match entry {
                EntryPoint::Pvh { rip, .. } => assert_eq!(Some(rip as u32), pvh),
                EntryPoint::Linux64 { rip, .. } => {
                    assert_eq!((rip, pvh), (KERNEL + 0x10, None));
                    // The setup header came along, but for the pointer to data it has no business to have.
                    assert_eq!(u32_at(&ram, layout::ZERO_PAGE + 0x22c), 0x7fff_ffff);
                    assert_eq!(u64_at(&ram, layout::ZERO_PAGE + 0x250), 0);
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_unpacked_unpacks_itself() {
    let own_entry = EntryPoint::Linux64 {
        rip: KERNEL + 0x200,
        zero_page: layout::ZERO_PAGE,
        page_tables: layout::PAGE_TABLES,
        gdt: layout::GDT,
    };
    let lzo = b"\x89LZO\0\r\n\x1a\n whatever".to_vec();
    let mut broken = pack(Format::Xz, &elf(&sample(5000), None));
    broken[100] ^= 1;
    for payload in [lzo, broken, pack(Format::Gzip, &sample(5000))] {
        let bytes = bzimage(&payload);
        let (ram, entry) = boot(64, &source(&bytes)).unwrap();
        assert_eq!(entry, own_entry);
        assert!(bytes_at(&ram, KERNEL, bytes.len() - 1024) == bytes[1024..]);
        // init_size counts: 16 MiB + 20 MiB, and room to work.
        let error = boot(40, &source(&bytes)).unwrap_err();
        assert!(matches!(error, BootError::KernelDoesNotFit { minimum: Minimum::Mib(44), .. }), "{error}");
        let mut only_32_bit = bytes.clone();
        only_32_bit[0x236] = 0;
        let error = boot(64, &source(&only_32_bit)).unwrap_err();
        assert!(matches!(error, BootError::NotAKernel { .. } | BootError::KernelDamaged { .. }), "{error}");
    }
}

#[test]
fn a_cached_kernel_needs_no_payload_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::in_dir(dir.path().join("kernels"));
    let code = sample(100_000);
    let source = source(&bzimage(&pack(Format::Lz4, &elf(&code, Some(KERNEL as u32)))));
    let check = || {
        let ram = machine(64);
        assert!(matches!(load(&ram, &source, &cache), Ok(EntryPoint::Pvh { .. })));
        assert!(bytes_at(&ram, KERNEL, code.len()) == code);
    };
    check();
    let entry = std::fs::read_dir(dir.path().join("kernels")).unwrap().next().unwrap().unwrap().path();
    check();
    // Cut short, and of the right size but without sense.
    std::fs::write(&entry, b"\x7fELF").unwrap();
    check();
    let size = entry.metadata().unwrap().len();
    File::options().write(true).open(&entry).unwrap().write_all_at(&[0; 4096], 0).unwrap();
    check();
    assert_eq!(entry.metadata().unwrap().len(), size);
    assert!(std::fs::read(&entry).unwrap().starts_with(b"\x7fELF"));
    // A cache that cannot be written to costs time only.
    std::fs::remove_dir_all(dir.path()).unwrap();
    let nowhere = KernelCache::in_dir("/proc/nowhere");
    assert!(load(&machine(64), &source, &nowhere).is_ok());
}

#[test]
fn what_is_no_kernel_is_told_from_a_damaged_one() {
    let good = elf(&sample(5000), None);
    let mut arm = good.clone();
    arm[18] = 183;
    let mut elf32 = good.clone();
    elf32[4] = 1;
    let mut no_segments = good.clone();
    no_segments[56] = 0;
    // One that wants a dynamic linker, and one that would be loaded anywhere.
    let mut program = elf(&sample(5000), Some(KERNEL as u32));
    program[64 + 2 * 56] = 3;
    let mut anywhere = good.clone();
    anywhere[16] = 3;
    anywhere[64 + 24..64 + 32].fill(0);
    let packed = bzimage(&pack(Format::Gzip, &good));
    let mut old = packed.clone();
    old[0x206] = 7;
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 5000], &arm, &elf32, &no_segments, &program, &anywhere, &old] {
        let error = boot(64, &source(bytes)).unwrap_err();
        assert!(matches!(error, BootError::NotAKernel { .. }), "{error:?}");
    }
    let mut wild_entry = good.clone();
    wild_entry[24] = 0;
    wild_entry[27] = 9;
    let mut wild_offset = good.clone();
    wild_offset[64 + 8..64 + 16].fill(0xff);
    let mut more_file_than_memory = good.clone();
    more_file_than_memory[64 + 40..64 + 48].copy_from_slice(&10u64.to_le_bytes());
    let damaged = [
        &good[..40],
        &good[..100],
        &good[..5000],
        &packed[..packed.len() - 1],
        &packed[..700],
        &packed[..0x212],
        &packed[..0x24f],
        &wild_entry,
        &wild_offset,
        &more_file_than_memory,
    ];
    for bytes in damaged {
        let error = boot(64, &source(bytes)).unwrap_err();
        assert!(matches!(error, BootError::KernelDamaged { .. }), "{error:?}");
    }
    let directory = BootFile { file: File::open("/").unwrap(), path: "/".into() };
    let error = boot(64, &BootSource { kernel: directory, ..source(&good) }).unwrap_err();
    assert!(matches!(error, BootError::ReadKernel { .. }), "{error:?}");
}

#[test]
fn too_little_memory_is_told_with_the_minimum() {
    let kernel = elf(&sample(5000), Some(KERNEL as u32));
    // 17 MiB and 32 KiB, and room to work.
    let error = boot(25, &source(&kernel)).unwrap_err();
    assert!(matches!(error, BootError::KernelDoesNotFit { memory_mib: 25, minimum: Minimum::Mib(26), .. }), "{error}");
    assert!(boot(26, &source(&kernel)).is_ok());
    let with_initrd = with_initrd(&kernel, &vec![1; 10 << 20]);
    let error = boot(16, &with_initrd).unwrap_err();
    assert!(matches!(error, BootError::KernelDoesNotFit { minimum: Minimum::Mib(36), .. }), "{error}");
    let error = boot(35, &with_initrd).unwrap_err();
    assert!(matches!(error, BootError::InitrdDoesNotFit { minimum: Minimum::Mib(36), .. }), "{error}");
    assert!(boot(36, &with_initrd).is_ok());
    // Over the command line, beyond the gap, and around the end of the address space.
    for addr in [layout::CMDLINE, layout::GAP_START, 4 << 30] {
        let mut kernel = kernel.clone();
        kernel[64 + 56 + 24..][..8].copy_from_slice(&addr.to_le_bytes());
        let error = boot(8192, &source(&kernel)).unwrap_err();
        assert!(matches!(error, BootError::KernelDoesNotFit { minimum: Minimum::Never, .. }), "{error}");
    }
}

#[test]
fn an_initrd_must_be_there() {
    let kernel = elf(&sample(5000), None);
    let error = boot(64, &with_initrd(&kernel, b"")).unwrap_err();
    assert!(matches!(error, BootError::InitrdEmpty { .. }), "{error}");
    let directory = BootFile { file: File::open("/").unwrap(), path: "/".into() };
    let error = boot(64, &BootSource { initrd: Some(directory), ..source(&kernel) }).unwrap_err();
    assert!(matches!(error, BootError::ReadInitrd { .. }), "{error}");
}

#[test]
fn the_command_line_has_a_limit() {
    let kernel = elf(&sample(5000), None);
    let packed = bzimage(&pack(Format::Gzip, &kernel));
    for (kernel, limit) in [(&kernel, 2047), (&packed, 100)] {
        assert!(boot(64, &BootSource { cmdline: "x".repeat(limit), ..source(kernel) }).is_ok());
        let error = boot(64, &BootSource { cmdline: "x".repeat(limit + 1), ..source(kernel) }).unwrap_err();
        assert!(matches!(error, BootError::CmdlineTooLong { length, limit: l } if length == l + 1 && l == limit));
    }
    for cmdline in ["a\0b", "a\nb", "a\r"] {
        let error = boot(64, &BootSource { cmdline: cmdline.into(), ..source(&kernel) }).unwrap_err();
        assert!(matches!(error, BootError::CmdlineCharacter { .. }), "{error}");
    }
}

/// Loads into a machine of 40 MiB: the outcome does not matter, only that there is one.
fn survive(kernel: &[u8]) {
    thread_local!(static RAM: Ram = machine(40));
    let source = with_initrd(kernel, b"initrd");
    RAM.with(|ram| {
        let ram = Arc::clone(ram);
        if load(&ram, &source, &KernelCache::off()).is_ok() {
            // Whatever the file says, the memory that belongs to nobody stays as it was.
            for hole in [0..layout::GDT, layout::LOW_RAM_END..layout::HIGH_RAM] {
                let bytes = bytes_at(&ram, hole.start, (hole.end - hole.start) as usize);
                assert!(bytes.iter().all(|&byte| byte == 0));
            }
            assert!(ram.find_region(GuestAddress(40 * MIB)).is_none());
        }
    });
}

/// Bytes, 32-bit and 64-bit words to overwrite.
fn damage(limit: usize) -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let interesting = prop_oneof![
        any::<u64>(),
        Just(0),
        Just(u64::MAX),
        0..64 * MIB,
        (0u32..64).prop_map(|bit| 1 << bit),
        (0u32..64, 1u64..8192).prop_map(|(bit, less)| (1u64 << bit).wrapping_sub(less)),
    ];
    let word = (0..limit, interesting, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)]);
    proptest::collection::vec(word.prop_map(|(at, value, size)| (at, value.to_le_bytes()[..size].to_vec())), 1..5)
}

fn damaged(bytes: &[u8], damage: Vec<(usize, Vec<u8>)>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, value) in damage {
        let end = (at + value.len()).min(bytes.len());
        bytes[at.min(end)..end].copy_from_slice(&value[..end - at.min(end)]);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_elf_is_survived(damage in damage(0x240), cut in 0usize..0x3000, pvh in any::<bool>()) {
        let mut bytes = damaged(&elf(&sample(0x1000), pvh.then_some(KERNEL as u32)), damage);
        bytes.truncate(cut.max(0x40));
        survive(&bytes);
    }

    #[test]
    fn any_segment_table_is_survived(damage in damage(168)) {
        let good = elf(&sample(0x1000), Some(KERNEL as u32));
        survive(&damaged(&good, damage.into_iter().map(|(at, value)| (64 + at, value)).collect()));
    }

    #[test]
    fn any_bzimage_is_survived(damage in damage(0xa0), inner in damage(0x240), lz4 in any::<bool>()) {
        let format = if lz4 { Format::Lz4 } else { Format::Gzip };
        let good = bzimage(&pack(format, &damaged(&elf(&sample(0x1000), None), inner)));
        survive(&damaged(&good, damage.into_iter().map(|(at, value)| (0x1f1 + at, value)).collect()));
    }

    #[test]
    fn any_file_is_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..3000), kind in 0..3) {
        match kind {
            0 => bytes.splice(..bytes.len().min(20), elf(b"", None)[..20].iter().copied()).for_each(drop),
            1 if bytes.len() > 0x212 => {
                bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
                bytes[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
                bytes[0x211] = 1;
            }
            _ => {}
        }
        survive(&bytes);
    }
}
