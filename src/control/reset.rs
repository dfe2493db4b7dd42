//! The reset button: the VM starts anew from its configuration, in this process and with its clients.

use super::owner::Owner;
use super::{Fault, Work};
use crate::config::MemorySize;
use crate::machine::{Machine, Origin, Pause, Remains, State};

impl Owner {
    /// Starts the VM anew, with nothing in its memory. What its clients have changed since it was started (devices,
    /// files, limits) stays so, and one that is paused stays paused. What the guest was to let go of is gone.
    ///
    /// # Errors
    /// What keeps it from being reset: all is as it was then. Unless it is what keeps the VM from being started again,
    /// its network say: then it is as if it had not been started.
    pub(super) fn reset(&mut self) -> Result<(), Fault> {
        if self.saving.is_some() {
            return Err(Fault::Conflict("A snapshot of this VM is being written.".into()));
        }
        let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
        let was_paused = match machine.state() {
            State::Ended(_) => return Err(Fault::Ended),
            state => matches!(state, State::Paused { .. } | State::Pausing { .. }),
        };
        let origin = self.plan.origin(&*self.host, &self.identity)?;
        let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
        if machine.pause()? == Pause::Pausing {
            self.go_on(!was_paused);
            return Err(Fault::Conflict("A vCPU is held up in a device of the host: try again later.".into()));
        }
        // The last thing that the guest did may have been to end, or to let go of a device.
        machine.handle_events().into_iter().for_each(|notice| self.heed(notice));
        let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
        if matches!(machine.state(), State::Ended(_)) {
            return Err(Fault::Ended);
        }
        match machine.part(&*self.host) {
            Ok(remains) => self.at_work(Work::Starting, |owner| owner.build_again(remains, origin, was_paused)),
            Err(error) => {
                self.go_on(!was_paused);
                Err(error.into())
            }
        }
    }

    fn build_again(&mut self, remains: Remains, origin: Origin, paused: bool) -> Result<(), Fault> {
        self.machine = None;
        self.take_next_size();
        remains.left.iter().for_each(|device| self.forget(device));
        let config = self.plan.machine_config();
        let (threads, pages) = (config.threads_per_core(), config.memory_pages());
        let (changes, tracks) = (self.plan.cpu_changes()?, config.track_dirty_pages);
        let mut parts = remains.into_parts(origin, threads, changes, pages, tracks, &*self.host)?;
        parts.budgets = self.budgets();
        (parts.cpus, parts.memory) = (config.vcpu_count, MemorySize(config.mem_size_mib << 20));
        let mut machine = Machine::build(parts, &*self.host, &self.timeline)?;
        machine.serial().limit(self.plan.serial_limits);
        if paused {
            machine.start_paused()?
        } else {
            machine.start()?
        }
        self.install(machine);
        Ok(())
    }
}
