//! What a guest's CPUs and memory look like, from inside and from outside.

use crate::guest::{Guest, LIMIT, value};

#[test]
fn two_threads_share_a_core() {
    let look = "
cd /sys/devices/system/cpu
echo siblings=$(cat cpu0/topology/thread_siblings_list) $(cat cpu3/topology/thread_siblings_list)
echo package=$(cat cpu0/topology/core_siblings_list)
echo smt=$(cat smt/active)
";
    let ended = Guest::new("cloud").arg("--cpus", "4,threads=2").run(look).expect_code(0);
    assert_eq!(value(&ended.output, "siblings"), "0-1 2-3");
    assert_eq!(value(&ended.output, "package"), "0-3");
    assert_eq!(value(&ended.output, "smt"), "1");
}

/// A host's setting, for as long as this is there.
struct Reserved(String);

const RESERVE: &str = "/proc/sys/vm/nr_hugepages";

impl Reserved {
    fn new(pages: u32) -> Self {
        let before = std::fs::read_to_string(RESERVE).unwrap();
        std::fs::write(RESERVE, pages.to_string()).unwrap();
        Self(before)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVE, &self.0);
    }
}

fn free_pages() -> u32 {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
    free.trim().parse().unwrap()
}

#[test]
fn a_guest_runs_in_huge_pages() {
    let mut guest = Guest::new("cloud").arg("--memory", "128M,hugepages=on");
    let reserved = Reserved::new(64);
    let before = free_pages();
    assert_eq!(before, 64, "this host is too full to reserve 128 MiB");
    let running = guest.start("echo up=yes; sleep 5");
    running.output.wait_for("up=yes", LIMIT);
    assert!(free_pages() < before / 2, "the guest's memory is somewhere else");
    running.wait(LIMIT).expect_code(0);
    assert_eq!(free_pages(), before);
    drop(reserved);
}
