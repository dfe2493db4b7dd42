//! What memory of the host this process takes, as the host's kernel sees it.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::config::MIN_MEMORY;

/// `/proc/self/smaps`, if there is one. Who reads it goes through it from its beginning.
static MAPPINGS: OnceLock<Option<Mutex<File>>> = OnceLock::new();

/// Bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUsage {
    /// That the guest has.
    pub guest: u64,
    /// What of both others have too: the program's code, a snapshot's pages.
    pub shared: u64,
    /// That the process needs besides.
    pub overhead: u64,
}

/// Has it be open, for who cannot open files later on: nobody tries again.
pub fn keep_mappings() -> Option<&'static Mutex<File>> {
    MAPPINGS.get_or_init(|| File::open("/proc/self/smaps").ok().map(Mutex::new)).as_ref()
}

/// What this process takes now. That takes the kernel a look at each page, some milliseconds per GiB of small ones.
///
/// # Errors
/// The host's.
pub fn usage() -> io::Result<MemoryUsage> {
    let mappings = keep_mappings().ok_or(io::ErrorKind::NotFound)?;
    let mut mappings = mappings.lock().unwrap_or_else(PoisonError::into_inner);
    let mut text = String::new();
    mappings.rewind()?;
    // Without asking first how long it is.
    mappings.by_ref().take(u64::MAX).read_to_string(&mut text)?;
    Ok(MemoryUsage::of(&text))
}

/// One of a process's mappings, as `/proc/PID/smaps` has it (proc(5)).
struct Mapping {
    start: u64,
    end: u64,
    resident: u64,
}

impl MemoryUsage {
    /// Of a process with these mappings: those as large as a guest's memory may be are that, with what lies right before them,
    /// as the first pages of a guest's memory are the host's in another way. The others are the process's own.
    fn of(smaps: &str) -> Self {
        let mut usage = Self::default();
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in smaps.lines() {
            let word = line.split(' ').next().unwrap_or_default();
            if let Some((start, end)) = word.split_once('-')
                && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
            {
                mappings.push(Mapping { start, end, resident: 0 });
            } else if let (Some((name, value)), Some(mapping)) = (line.split_once(':'), mappings.last_mut()) {
                let kib: u64 = value.trim().strip_suffix(" kB").and_then(|kib| kib.parse().ok()).unwrap_or(0);
                match name {
                    "Rss" => mapping.resident = kib << 10,
                    "Shared_Clean" | "Shared_Dirty" => usage.shared += kib << 10,
                    _ => {}
                }
            }
        }
        let mut next: Option<u64> = None;
        for mapping in mappings.iter().rev() {
            let is_large = mapping.end.saturating_sub(mapping.start) >= MIN_MEMORY / 2;
            if is_large || next == Some(mapping.end) {
                usage.guest += mapping.resident;
            } else {
                usage.overhead += mapping.resident;
            }
            next = is_large.then_some(mapping.start);
        }
        usage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_the_guests_or_the_process_s_own() {
        let smaps = "5500-5600 r-xp 0 00:00 0\nSize: 1 kB\nRss: 300 kB\nShared_Dirty: 6 kB\n\
                     7effffe00000-7f0000000000 rw-p 0 00:00 0\nRss: 200 kB\n\
                     7f0000000000-7f0010000000 rw-p 0 00:00 0\nRss: 800 kB\nShared_Clean: 4 kB\nVmFlags: rd wr\n";
        let expected = MemoryUsage { guest: 1000 << 10, shared: 10 << 10, overhead: 300 << 10 };
        assert_eq!(MemoryUsage::of(smaps), expected);
    }

    #[test]
    fn this_process_takes_some_each_time_that_it_is_asked() {
        for _ in 0..2 {
            let usage = usage().unwrap();
            assert!(usage.overhead > 64 << 10 && usage.shared > 0, "{usage:?}");
        }
    }
}
