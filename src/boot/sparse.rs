//! Files with holes: a kernel image is up to a third zeroes (its bss), which cost nothing when nobody writes them.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileMemoryError};

use crate::memory::RamRegions;

/// The unit of holes, in bytes. Smaller ones would save little and cost two system calls each.
const BLOCK: usize = 0x1_0000;

/// Reads the bytes `range` of `file` to guest address `addr`, without a buffer in between. The caller has
/// checked that the file has those bytes and that the destination is RAM.
///
/// The RAM has to be fresh, which is to say zero: holes of the file are left out.
pub fn read_to_guest(mut file: &File, range: Range<u64>, ram: &RamRegions, addr: u64) -> io::Result<()> {
    for extent in Extents::new(file, range.clone()) {
        let extent = extent?;
        file.seek(SeekFrom::Start(extent.start))?;
        let start = GuestAddress(addr + (extent.start - range.start));
        for slice in ram.get_slices(start, (extent.end - extent.start) as usize) {
            let mut slice = slice.map_err(io::Error::other)?;
            file.read_exact_volatile(&mut slice).map_err(|error| match error {
                VolatileMemoryError::IOError(error) => error,
                other => io::Error::other(other),
            })?;
        }
    }
    Ok(())
}

/// Which side of a copy failed.
#[derive(Debug)]
pub enum CopyError {
    Source(io::Error),
    Output(io::Error),
    /// The source has more bytes than the caller allows.
    TooLong,
}

/// Fills an empty `file` with what `source` yields, leaving holes where it yields blocks of zeroes. Returns how
/// many bytes there were: at most `limit`.
pub fn write_sparse(source: &mut dyn Read, mut file: &File, limit: u64) -> Result<u64, CopyError> {
    let mut buffer = vec![0; 4 * BLOCK];
    let mut total = 0u64;
    loop {
        let filled = read_full(source, &mut buffer).map_err(CopyError::Source)?;
        if filled as u64 > limit - total {
            return Err(CopyError::TooLong);
        }
        for run in data_runs(&buffer[..filled]) {
            file.seek(SeekFrom::Start(total + run.start as u64)).map_err(CopyError::Output)?;
            file.write_all(&buffer[run]).map_err(CopyError::Output)?;
        }
        total += filled as u64;
        if filled < buffer.len() {
            file.set_len(total).map_err(CopyError::Output)?;
            return Ok(total);
        }
    }
}

/// Copies all `len` bytes of a sparse file into an empty one, holes as holes.
pub fn copy_sparse(mut from: &File, mut to: &File, len: u64) -> io::Result<()> {
    for extent in Extents::new(from, 0..len) {
        let extent = extent?;
        from.seek(SeekFrom::Start(extent.start))?;
        to.seek(SeekFrom::Start(extent.start))?;
        let size = extent.end - extent.start;
        if io::copy(&mut from.take(size), &mut to)? != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    to.set_len(len)
}

/// The parts of a range of a file that hold data, in order. Where the file system cannot tell, all of it does.
struct Extents<'a> {
    file: &'a File,
    left: Range<u64>,
}

impl<'a> Extents<'a> {
    fn new(file: &'a File, range: Range<u64>) -> Self {
        Self { file, left: range }
    }
}

impl Iterator for Extents<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let Range { start, end } = self.left;
        if start >= end {
            return None;
        }
        let found = find_data(self.file, start).map(|found| match found {
            Some(data) if data.start < end => Some(data.start.max(start)..data.end.clamp(start, end)),
            _ => None,
        });
        // After an error, and after the last extent, there is nothing more to come.
        self.left.start = found.as_ref().ok().and_then(Option::as_ref).map_or(end, |data| data.end);
        found.transpose().map(|found| found.map_err(io::Error::from))
    }
}

/// The first extent of data at or behind `offset`; `None` when only a hole follows.
fn find_data(file: &File, offset: u64) -> rustix::io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..u64::MAX)),
        Err(error) => return Err(error),
    };
    let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?;
    // Both were asked for one after the other: a file that is being written may answer nonsense.
    Ok((start < end).then_some(start..end))
}

/// The runs of blocks of `bytes` that are not all zero.
fn data_runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, block) in bytes.chunks(BLOCK).enumerate() {
        if block.iter().all(|&byte| byte == 0) {
            continue;
        }
        let (start, end) = (i * BLOCK, i * BLOCK + block.len());
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Reads until the buffer is full or the source ends.
fn read_full(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;
    use std::os::unix::fs::FileExt;
    use vm_memory::Bytes;

    fn with_holes() -> Vec<u8> {
        let mut bytes = vec![0u8; 9 * BLOCK + 17];
        bytes[0] = 1;
        bytes[3 * BLOCK + 5] = 2;
        bytes[4 * BLOCK] = 3;
        bytes
    }

    #[test]
    fn holes_change_nothing_but_the_cost() {
        let bytes = with_holes();
        let (file, copy) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        assert_eq!(write_sparse(&mut &bytes[..], &file, bytes.len() as u64).unwrap(), bytes.len() as u64);
        copy_sparse(&file, &copy, bytes.len() as u64).unwrap();
        let ram = anonymous(&[(GuestAddress(0), 0x5_0000), (GuestAddress(0x5_0000), 0x10_0000)]).unwrap();
        for file in [file, copy] {
            let mut got = vec![9; bytes.len()];
            file.read_exact_at(&mut got, 0).unwrap();
            assert!(got == bytes);
            assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
            read_to_guest(&file, 5..bytes.len() as u64, &ram, 0x1_0003).unwrap();
            ram.read_slice(&mut got[5..], GuestAddress(0x1_0003)).unwrap();
            assert!(got[5..] == bytes[5..]);
        }
    }

    #[test]
    fn output_is_limited() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(write_sparse(&mut io::repeat(0), &file, 1 << 20), Err(CopyError::TooLong)));
        assert!(file.metadata().unwrap().len() <= 1 << 20);
    }
}
