//! Guest RAM in a file, and a file as guest RAM.
//!
//! In the file the regions lie one behind the other. What nobody has touched is a hole in it, and so is a page of
//! zeroes: neither takes space, nor time.
//!
//! RAM of a file is a private mapping: pages come from the file as the guest looks at them, and those it writes are its
//! own from then on. The file is never written to.

#![expect(unsafe_code, reason = "an ioctl and reads on guest memory by its addresses")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use super::{DirtyBitmap, MemoryError, PAGE, Ram, RamRegions};

/// Writes all of RAM into an empty file. Nobody may write to RAM meanwhile.
///
/// # Errors
/// The host's, such as a full disk.
pub fn save(ram: &RamRegions, file: &File) -> io::Result<()> {
    save_pages(ram, file, own_pages)
}

/// As [`save`], of RAM whose pages come from somebody else: all of them are looked at, and so come.
///
/// # Errors
/// As there.
pub fn save_all(ram: &RamRegions, file: &File) -> io::Result<()> {
    save_pages(ram, file, |all, each| each(all))
}

/// Calls its last argument for some pages of a range.
type ForEach = fn(Range<usize>, &mut dyn FnMut(Range<usize>) -> io::Result<()>) -> io::Result<()>;

fn save_pages(ram: &RamRegions, file: &File, for_each: ForEach) -> io::Result<()> {
    file.set_len(super::total_bytes(ram))?;
    let mut start = 0;
    for region in ram.iter() {
        let mapping: &MmapRegion<DirtyBitmap> = region;
        let has_base = match mapping.file_offset() {
            Some(base) => {
                copy_data(base.file(), file, start..start + region.len())?;
                true
            }
            None => false,
        };
        let host = mapping.as_ptr().addr();
        for_each(host..host + mapping.size(), &mut |pages| {
            let page_is_zero = |page: usize| is_zero(mapping, page - host);
            let mut rest = pages;
            while !rest.is_empty() {
                let zero = page_is_zero(rest.start);
                let alike = rest.clone().step_by(PAGE.get()).take_while(|&page| page_is_zero(page) == zero).count();
                let run = rest.start..rest.start + alike * PAGE.get();
                rest.start = run.end;
                let at = start + (run.start - host) as u64;
                if !zero {
                    write_all(mapping, run.start - host, run.len(), file, at)?;
                } else if has_base {
                    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(file, punch, at, run.len() as u64)?;
                }
            }
            Ok(())
        })?;
        start += region.len();
    }
    Ok(())
}

/// Maps a file that [`save`] has written, each `(guest address, bytes)` range behind the one before.
///
/// # Errors
/// When the file is not as long as the ranges are, or the host has no room for them.
pub fn map(file: &File, ranges: &[(GuestAddress, u64)]) -> Result<Ram, MemoryError> {
    let (wanted, len) = (ranges.iter().map(|range| range.1).sum(), file.metadata().map_err(MemoryError::File)?.len());
    if len != wanted {
        return Err(MemoryError::FileSize { wanted, len });
    }
    let file = std::sync::Arc::new(file.try_clone().map_err(MemoryError::File)?);
    let in_page_cache = begins_in_page_cache(&file);
    let mut regions = Vec::with_capacity(ranges.len());
    let mut offset = 0;
    for &(start, size) in ranges {
        let bytes = usize::try_from(size).map_err(|_| MemoryError::Layout)?;
        let bitmap = DirtyBitmap::for_bytes(bytes).ok_or(MemoryError::Track { size })?;
        let mapping = MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .build()
            .map_err(|source| MemoryError::Map { size, source })?;
        if in_page_cache {
            // What the guest looks at then is a hole, and reading ahead would fill the page cache with zeroes, up to
            // a millisecond of them where the host reads far ahead.
            // SAFETY: advice about a mapping of ours.
            unsafe { libc::madvise(mapping.as_ptr().cast(), bytes, libc::MADV_RANDOM) };
        }
        regions.push(GuestRegionMmap::new(mapping, start).ok_or(MemoryError::Layout)?);
        offset += size;
    }
    GuestMemoryMmap::from_regions(regions).map(Ram::new).map_err(|_| MemoryError::Layout)
}

/// Has the host the file's data at hand? Its beginning stands for all of it: there is something in it in every guest.
fn begins_in_page_cache(file: &File) -> bool {
    const BEGINNING: u64 = 4 << 20;
    /// `struct cachestat` (Linux 6.5, uapi/linux/mman.h): pages cached, dirty, under writeback, evicted, recently.
    type CacheStat = [u64; 5];
    const SYS_CACHESTAT: libc::c_long = 451;
    let range: [u64; 2] = [0, BEGINNING];
    let mut counts = CacheStat::default();
    // SAFETY: both arguments are as the kernel declares them. One that does not know the call says so.
    let status = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    status == 0 && counts[0] > 0
}

/// Copies what is not a hole; shares it where the file system can.
pub fn copy_data(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    for data in Data::new(from, range) {
        let data = data?;
        let (mut read_at, mut write_at) = (data.start, data.start);
        while read_at < data.end {
            let left = usize::try_from(data.end - read_at).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                // Other file systems, and block devices, which have no such call.
                Err(
                    rustix::io::Errno::XDEV
                    | rustix::io::Errno::NOSYS
                    | rustix::io::Errno::OPNOTSUPP
                    | rustix::io::Errno::INVAL,
                ) => {
                    let mut chunk = vec![0; left.min(1 << 20)];
                    from.read_exact_at(&mut chunk, read_at)?;
                    to.write_all_at(&chunk, write_at)?;
                    read_at += chunk.len() as u64;
                    write_at = read_at;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// The parts of a file that are not holes.
pub struct Data<'a> {
    file: &'a File,
    left: Range<u64>,
}

impl<'a> Data<'a> {
    #[must_use]
    pub fn new(file: &'a File, range: Range<u64>) -> Self {
        Self { file, left: range }
    }

    fn next_data(&mut self) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::SeekFrom;
        if self.left.is_empty() {
            return Ok(None);
        }
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(self.left.start)) {
            Ok(start) if start < self.left.end => start,
            Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A file system without holes.
            Err(rustix::io::Errno::INVAL) => return Ok(Some(std::mem::replace(&mut self.left, 0..0))),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(self.file, SeekFrom::Hole(start))?.min(self.left.end);
        self.left.start = end;
        Ok(Some(start..end))
    }
}

impl Iterator for Data<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_data().transpose()
    }
}

fn is_zero(mapping: &MmapRegion<DirtyBitmap>, offset: usize) -> bool {
    let words = mapping.as_ptr().wrapping_add(offset).cast::<u64>();
    (0..PAGE.get() / size_of::<u64>()).all(|word| {
        // SAFETY: the page lies in the mapping, and its start is aligned; a guest's value may be any.
        unsafe { words.add(word).read_volatile() == 0 }
    })
}

pub(super) fn write_all(
    mapping: &MmapRegion<DirtyBitmap>,
    mut from: usize,
    mut len: usize,
    file: &File,
    mut at: u64,
) -> io::Result<()> {
    while len > 0 {
        let start = mapping.as_ptr().wrapping_add(from);
        let offset = i64::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        // SAFETY: the range lies in the mapping, from which the kernel reads.
        let written = unsafe { libc::pwrite64(file.as_raw_fd(), start.cast(), len, offset) };
        match usize::try_from(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => (from, len, at) = (from + written, len - written, at + written as u64),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// `struct pm_scan_arg` (Linux, uapi/linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO_PAGE: u64 = 1 << 5;

/// Calls `each` for runs of pages that are the mapping's own: that somebody has written to, and not those that lie in
/// a file behind it. Where the host does not tell, that is all of them.
pub(super) fn own_pages(range: Range<usize>, each: &mut dyn FnMut(Range<usize>) -> io::Result<()>) -> io::Result<()> {
    match super::pagemap() {
        // In a root directory without /proc.
        Err(error) if error.kind() == io::ErrorKind::NotFound => each(range),
        pagemap => for_each_own(pagemap?, range, each),
    }
}

fn for_each_own(
    pagemap: &File,
    range: Range<usize>,
    each: &mut dyn FnMut(Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = range.start;
    let mut found = [Region::default(); 256];
    while at < range.end {
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start: at as u64,
            end: range.end as u64,
            vec: found.as_mut_ptr().addr() as u64,
            vec_len: found.len() as u64,
            category_inverted: IS_FILE | IS_ZERO_PAGE,
            category_mask: IS_FILE | IS_ZERO_PAGE,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_PRESENT,
            ..Scan::default()
        };
        // SAFETY: the argument is as the kernel declares it, and `found` has room for as many as it says.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
        let Ok(count) = usize::try_from(count) else {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                // A kernel before 6.7.
                error if error.raw_os_error() == Some(libc::ENOTTY) => {
                    return for_each_own_by_reading(pagemap.as_fd(), at..range.end, each);
                }
                error => return Err(error),
            }
        };
        for region in &found[..count] {
            each(region.start as usize..region.end as usize)?;
        }
        at = scan.walk_end as usize;
    }
    Ok(())
}

/// The same from what every kernel tells: a word per page (Documentation/admin-guide/mm/pagemap.rst).
fn for_each_own_by_reading(
    pagemap: BorrowedFd<'_>,
    range: Range<usize>,
    each: &mut dyn FnMut(Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    const FILE: u64 = 1 << 61;
    const SWAPPED: u64 = 1 << 62;
    const PRESENT: u64 = 1 << 63;
    const WORD: usize = size_of::<u64>();
    let is_own = |word: u64| word & (PRESENT | SWAPPED) != 0 && word & FILE == 0;
    let mut words = [0; 4096 * WORD];
    let mut at = range.start;
    let mut run = at..at;
    while at < range.end {
        let wanted = words.len().min((range.end - at) / PAGE * WORD);
        let read = rustix::io::pread(pagemap, &mut words[..wanted], (at / PAGE * WORD) as u64)?;
        if read < WORD {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for word in words[..read].chunks_exact(WORD) {
            let own = is_own(u64::from_ne_bytes(word.try_into().expect("8 bytes")));
            if !own && !run.is_empty() {
                each(run.clone())?;
            }
            at += PAGE.get();
            run = if own { run.start..at } else { at..at };
        }
    }
    if run.is_empty() { Ok(()) } else { each(run) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{PAGE_SIZE, anonymous};
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::Bytes;

    const RANGES: [(GuestAddress, u64); 2] =
        [(GuestAddress(0), 64 * PAGE_SIZE), (GuestAddress(0x1_0000_0000), 32 * PAGE_SIZE)];

    fn address(page: u64) -> GuestAddress {
        if page < 64 { GuestAddress(page * PAGE_SIZE) } else { GuestAddress(0x1_0000_0000 + (page - 64) * PAGE_SIZE) }
    }

    fn contents(ram: &RamRegions) -> Vec<u8> {
        let mut bytes = vec![0; 96 * PAGE_SIZE as usize];
        let (low, high) = bytes.split_at_mut(64 * PAGE_SIZE as usize);
        ram.read_slice(low, GuestAddress(0)).unwrap();
        ram.read_slice(high, GuestAddress(0x1_0000_0000)).unwrap();
        bytes
    }

    #[test]
    fn what_is_untouched_or_zero_takes_no_space() {
        let ram = anonymous(&[(GuestAddress(0), 1 << 30)]).unwrap();
        ram.write_slice(&[0; 1 << 16], GuestAddress(0x10_0000)).unwrap();
        ram.write_obj(7u64, GuestAddress(0x2000_0008)).unwrap();
        let file = tempfile::tempfile().unwrap();
        save(&ram, &file).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 1 << 30);
        assert!(metadata.blocks() * 512 <= 64 << 10, "{} blocks", metadata.blocks());
        let again = map(&file, &[(GuestAddress(0), 1 << 30)]).unwrap();
        assert_eq!(again.read_obj::<u64>(GuestAddress(0x2000_0008)).unwrap(), 7);
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = tempfile::tempfile().unwrap();
        for len in [0, 95 * PAGE_SIZE, 96 * PAGE_SIZE + 1, 1 << 40] {
            file.set_len(len).unwrap();
            assert!(matches!(map(&file, &RANGES), Err(MemoryError::FileSize { .. })), "{len}");
        }
    }

    /// What is done to a page.
    #[derive(Debug, Clone, Copy)]
    enum Touch {
        Write(u8),
        Read,
    }

    fn touches() -> impl Strategy<Value = Vec<(u64, Touch)>> {
        let touch = prop_oneof![(0u8..3).prop_map(Touch::Write), Just(Touch::Read)];
        prop::collection::vec((0u64..96, touch), 0..60)
    }

    fn apply(ram: &RamRegions, touches: &[(u64, Touch)]) {
        for &(page, touch) in touches {
            match touch {
                Touch::Write(byte) => ram.write_slice(&[byte; PAGE_SIZE as usize], address(page)).unwrap(),
                Touch::Read => drop(ram.read_obj::<u8>(address(page)).unwrap()),
            }
        }
    }

    proptest! {
        /// Generations of it: RAM of a file that is saved again is as if it had never been saved.
        #[test]
        fn ram_comes_back(generations in prop::collection::vec(touches(), 1..4)) {
            let mut ram = anonymous(&RANGES).unwrap();
            for touches in generations {
                apply(&ram, &touches);
                let before = contents(&ram);
                let file = tempfile::tempfile().unwrap();
                save(&ram, &file).unwrap();
                ram = map(&file, &RANGES).unwrap();
                prop_assert_eq!(contents(&ram), before);
            }
        }

        #[test]
        fn old_and_new_kernels_tell_the_same(touches in touches()) {
            let ram = anonymous(&RANGES[..1]).unwrap();
            let low: Vec<_> = touches.into_iter().filter(|touch| touch.0 < 64).collect();
            apply(&ram, &low);
            let pagemap = crate::memory::pagemap().unwrap();
            let start = ram.iter().next().unwrap().as_ptr().addr();
            let range = start..start + 64 * PAGE.get();
            let mut read = Vec::new();
            for_each_own_by_reading(pagemap.as_fd(), range.clone(), &mut |run| { read.push(run); Ok(()) }).unwrap();
            let mut scanned = Vec::new();
            for_each_own(pagemap, range, &mut |run| { scanned.push(run); Ok(()) }).unwrap();
            let written: std::collections::BTreeSet<_> =
                low.iter().filter(|t| matches!(t.1, Touch::Write(_))).map(|t| start + t.0 as usize * PAGE.get()).collect();
            // A page that was only read may be there, as the zero page; one that was written has to be.
            for runs in [&read, &scanned] {
                let pages: std::collections::BTreeSet<_> = runs.iter().cloned().flat_map(|run| run.step_by(PAGE.get())).collect();
                prop_assert!(written.is_subset(&pages));
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{:x?}", runs);
            }
        }
    }
}
