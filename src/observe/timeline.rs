//! The boot timeline: when each step of a start was reached.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// A step of a start, in the order they are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestone {
    VmCreated,
    MemoryMapped,
    KernelLoaded,
    DevicesReady,
    FirstEntry,
    FirstConsoleByte,
    Userspace,
}

const MILESTONES: [(Milestone, &str); 7] = [
    (Milestone::VmCreated, "VM created"),
    (Milestone::MemoryMapped, "guest memory mapped"),
    (Milestone::KernelLoaded, "kernel loaded"),
    (Milestone::DevicesReady, "devices and vCPUs ready"),
    (Milestone::FirstEntry, "first vCPU entry"),
    (Milestone::FirstConsoleByte, "first console byte"),
    (Milestone::Userspace, "userspace (boot mark)"),
];

/// Times since the program's first line. Marking is one clock reading and one store, from any thread.
pub struct Timeline {
    start: Instant,
    /// Nanoseconds; zero is "not reached".
    marks: [AtomicU64; MILESTONES.len()],
    /// Is the guest's arrival in userspace to be logged?
    log_userspace: AtomicBool,
}

impl Timeline {
    #[must_use]
    pub fn from(start: Instant) -> Self {
        Self { start, marks: Default::default(), log_userspace: AtomicBool::new(false) }
    }

    /// Has the guest's arrival in userspace logged.
    pub fn log_userspace(&self) {
        self.log_userspace.store(true, Ordering::Relaxed);
    }

    /// Notes the first time a milestone is reached; later times change nothing.
    pub fn mark(&self, milestone: Milestone) {
        let mark = &self.marks[milestone as usize];
        if mark.load(Ordering::Relaxed) == 0 {
            let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
            let first = mark.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            if first && milestone == Milestone::Userspace && self.log_userspace.load(Ordering::Relaxed) {
                log_boot_time(now / 1000);
            }
        }
    }
}

/// In the form that Firecracker's users look for.
fn log_boot_time(us: u64) {
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let cpu_us = cpu.tv_sec * 1_000_000 + cpu.tv_nsec / 1000;
    tracing::info!("Guest-boot-time = {us:>6} us {} ms, {cpu_us:>6} CPU us {} CPU ms", us / 1000, cpu_us / 1000);
}

/// A table of what was reached: milliseconds since the start, and since the step before.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = 0;
        writeln!(f, "{:>12} {:>12}  boot timeline", "ms", "step")?;
        for (milestone, name) in MILESTONES {
            match self.marks[milestone as usize].load(Ordering::Relaxed) {
                0 => writeln!(f, "{:>12} {:>12}  {name}", "-", "-")?,
                at => {
                    let ms = |ns: u64| ns as f64 / 1e6;
                    writeln!(f, "{:>12.3} {:>12.3}  {name}", ms(at), ms(at.saturating_sub(before)))?;
                    before = at;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milestones_are_marked_once_and_printed_in_order() {
        for (index, (milestone, _)) in MILESTONES.iter().enumerate() {
            assert_eq!(*milestone as usize, index);
        }
        let timeline = Timeline::from(Instant::now());
        timeline.mark(Milestone::VmCreated);
        let first = timeline.marks[0].load(Ordering::Relaxed);
        timeline.mark(Milestone::VmCreated);
        assert_eq!(timeline.marks[0].load(Ordering::Relaxed), first);
        let table = timeline.to_string();
        assert_eq!(table.lines().count(), 1 + MILESTONES.len());
        assert!(table.lines().last().unwrap().trim_start().starts_with('-'), "userspace was not reached: {table}");
    }
}
