//! Where vCPUs wait while their VM is paused.
//!
//! ```text
//!   vCPU:   enter guest ──▶ left, nothing of it left to do ──▶ pass ──▶ enter guest ...
//!                                                               │ ▲
//!   owner:  close, kick all, all_outside ...                    ▼ │ open
//!                                                             waits here
//! ```
//! The owner closes the gate before it kicks, and a vCPU forgets the kick before it goes on, under the lock: so no kick
//! is lost between two pauses.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
/// For good.
const SHUT: u8 = 2;

pub struct Gate {
    /// Written under the lock; read without it each time that a vCPU comes by.
    position: AtomicU8,
    vcpus: Mutex<Count>,
    opened: Condvar,
    all_outside: Condvar,
}

struct Count {
    total: usize,
    /// Those that wait at the gate, and those that have ended.
    outside: usize,
}

impl Gate {
    pub fn new(vcpus: usize) -> Self {
        Self {
            position: AtomicU8::new(OPEN),
            vcpus: Mutex::new(Count { total: vcpus, outside: 0 }),
            opened: Condvar::new(),
            all_outside: Condvar::new(),
        }
    }

    /// Nobody is to enter the guest from now on. Those inside have to be kicked.
    pub fn close(&self) {
        self.turn(OPEN, CLOSED);
    }

    pub fn open(&self) {
        self.turn(CLOSED, OPEN);
    }

    /// All vCPUs are to end.
    pub fn shut(&self) {
        let _vcpus = self.lock();
        self.position.store(SHUT, Ordering::Release);
        self.opened.notify_all();
    }

    fn turn(&self, from: u8, to: u8) {
        let _vcpus = self.lock();
        if self.position.load(Ordering::Relaxed) == from {
            self.position.store(to, Ordering::Release);
            self.opened.notify_all();
        }
    }

    pub fn is_closed(&self) -> bool {
        self.position.load(Ordering::Acquire) == CLOSED
    }

    pub fn is_shut(&self) -> bool {
        self.position.load(Ordering::Acquire) == SHUT
    }

    /// Waits until no vCPU is inside any more, but not for longer than that. Tells whether it is so.
    pub fn all_outside(&self, patience: Duration) -> bool {
        let inside = |vcpus: &mut Count| vcpus.outside < vcpus.total;
        let waited = self.all_outside.wait_timeout_while(self.lock(), patience, inside);
        let (vcpus, _) = waited.unwrap_or_else(PoisonError::into_inner);
        vcpus.outside == vcpus.total
    }

    /// A vCPU comes by and waits while the gate is closed; `true` if it has waited. Before it goes on it does `forget`
    /// what made it come. If it is the last one, it calls `all_here`.
    pub fn pass(&self, forget: impl FnOnce(), all_here: impl FnOnce()) -> bool {
        let closed = |_: &mut Count| self.position.load(Ordering::Relaxed) == CLOSED;
        let mut vcpus = self.lock();
        let waits = closed(&mut vcpus);
        if waits {
            vcpus.count_out(&self.all_outside, all_here);
            vcpus = self.opened.wait_while(vcpus, closed).unwrap_or_else(PoisonError::into_inner);
            vcpus.outside -= 1;
        }
        // Also one that has come too late: the gate is open again.
        forget();
        waits
    }

    /// A vCPU has ended.
    pub fn leave(&self, all_here: impl FnOnce()) {
        self.lock().count_out(&self.all_outside, all_here);
    }

    fn lock(&self) -> MutexGuard<'_, Count> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Count {
    fn count_out(&mut self, all_outside: &Condvar, all_here: impl FnOnce()) {
        self.outside += 1;
        if self.outside == self.total {
            all_outside.notify_all();
            all_here();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32};

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A vCPU without a guest: a kick makes it come by.
    #[derive(Default)]
    struct Vcpu {
        kicked: AtomicBool,
        rounds: AtomicU32,
    }

    impl Vcpu {
        fn run(&self, gate: &Gate) {
            while !gate.is_shut() {
                self.rounds.fetch_add(1, Ordering::Relaxed);
                if self.kicked.load(Ordering::Acquire) {
                    gate.pass(|| self.kicked.store(false, Ordering::Release), || ());
                }
            }
            gate.leave(|| ());
        }
    }

    #[test]
    fn no_kick_is_lost_between_pauses_and_nobody_enters_a_closed_gate() {
        let gate = Gate::new(3);
        let vcpus: [Vcpu; 3] = Default::default();
        std::thread::scope(|threads| {
            for vcpu in &vcpus {
                threads.spawn(|| vcpu.run(&gate));
            }
            for round in 0..2000 {
                gate.close();
                vcpus.iter().for_each(|vcpu| vcpu.kicked.store(true, Ordering::Release));
                assert!(gate.all_outside(PATIENCE), "round {round}");
                let rounds = || vcpus.each_ref().map(|vcpu| vcpu.rounds.load(Ordering::Relaxed));
                let before = rounds();
                if round % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
                assert_eq!(rounds(), before);
                gate.open();
                if round % 3 == 0 {
                    // A kick that comes after the opening, too, at times.
                    vcpus.iter().for_each(|vcpu| vcpu.kicked.store(true, Ordering::Release));
                    std::thread::yield_now();
                }
            }
            let begun = std::time::Instant::now();
            while vcpus.iter().any(|vcpu| vcpu.kicked.load(Ordering::Acquire)) {
                assert!(begun.elapsed() < PATIENCE, "a kick is not forgotten");
                std::thread::yield_now();
            }
            gate.shut();
            assert!(gate.all_outside(PATIENCE));
            gate.open();
            gate.close();
            assert!(gate.is_shut());
        });
    }

    #[test]
    fn the_last_one_says_so() {
        let gate = Arc::new(Gate::new(2));
        let said = Arc::new(AtomicU32::new(0));
        gate.close();
        assert!(!gate.all_outside(Duration::ZERO));
        let say = |said: &AtomicU32| {
            said.fetch_add(1, Ordering::SeqCst);
        };
        gate.leave(|| say(&said));
        assert_eq!(said.load(Ordering::SeqCst), 0);
        let waiting = {
            let (gate, said) = (gate.clone(), said.clone());
            std::thread::spawn(move || gate.pass(|| (), || say(&said)))
        };
        assert!(gate.all_outside(PATIENCE));
        assert_eq!(said.load(Ordering::SeqCst), 1);
        gate.open();
        assert!(waiting.join().unwrap());
        assert!(!gate.pass(|| (), || ()), "an open gate keeps nobody");
    }
}
