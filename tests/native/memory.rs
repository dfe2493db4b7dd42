//! What a VM costs beside what its guest uses.

use std::time::Duration;

use crate::guest::{guest, started};

/// A number of KiB from `/proc/PID/status`.
fn status(pid: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("no {key} in {status}"));
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn unused_memory_costs_nothing() {
    // Without the program's own pages, which come and go as the host reads its file around those that are used.
    let private = |memory| {
        let running = started(guest("hello", "end=halt").args(["--memory", memory]), "\nend\n");
        // What has built it is let go of in a moment: the least of some looks.
        let looks = (0..20).map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            ["RssAnon:", "RssShmem:", "VmPTE:"].into_iter().map(|what| status(running.vmm(), what)).sum::<u64>()
        });
        looks.min().unwrap()
    };
    let (small, large) = (private("128M"), private("64G"));
    assert!(large < small + 256, "128M takes {small} KiB, 64G {large} KiB");
}
