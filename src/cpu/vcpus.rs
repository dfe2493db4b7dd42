//! All vCPUs of a VM: started, paused and ended together.

use std::sync::Arc;
use std::time::Duration;

use super::gate::Gate;
use kvm_ioctls::VmFd;

use super::vcpu::{CpuError, ExitHandler, Vcpu, VcpuHandle};
use super::{StateShape, VcpuStateV1};
use crate::observe::Exits;

/// The vCPUs. Dropping them ends them, and waits for that.
pub struct Vcpus {
    /// Before the start; then empty.
    waiting: Vec<Vcpu>,
    running: Vec<VcpuHandle>,
    gate: Arc<Gate>,
    /// By vCPU.
    exits: Vec<Arc<Exits>>,
}

impl Vcpus {
    #[must_use]
    pub fn new(vcpus: Vec<Vcpu>) -> Self {
        let gate = Arc::new(Gate::new(vcpus.len()));
        let exits = vcpus.iter().map(|vcpu| vcpu.exits.clone()).collect();
        Self { waiting: vcpus, running: Vec::new(), gate, exits }
    }

    #[must_use]
    pub fn count(&self) -> u8 {
        // There are never more than a configuration can say.
        self.exits.len().try_into().unwrap_or(u8::MAX)
    }

    /// What each has left the guest for.
    #[must_use]
    pub fn exits(&self) -> &[Arc<Exits>] {
        &self.exits
    }

    /// Starts each in a thread of its own, called `thread` and the vCPU's number.
    ///
    /// # Errors
    /// When the host has no thread for one of them.
    pub fn start(&mut self, thread: &str, handler: &Arc<dyn ExitHandler>) -> Result<(), CpuError> {
        for vcpu in std::mem::take(&mut self.waiting) {
            self.running.push(vcpu.start(thread, handler.clone(), self.gate.clone())?);
        }
        Ok(())
    }

    /// As [`Self::start`], but they wait to be resumed.
    ///
    /// # Errors
    /// As there.
    pub fn start_paused(&mut self, thread: &str, handler: &Arc<dyn ExitHandler>) -> Result<(), CpuError> {
        self.gate.close();
        self.start(thread, handler)
    }

    /// What each of them is. None may be in the guest.
    ///
    /// # Errors
    /// KVM's.
    pub fn save(&self, vm: &VmFd, shape: &StateShape) -> Result<Vec<VcpuStateV1>, CpuError> {
        let waiting = self.waiting.iter().map(|vcpu| vcpu.save(shape));
        waiting.chain(self.running.iter().map(|vcpu| vcpu.save(vm, shape))).collect()
    }

    /// Asks all to leave the guest until they are resumed. [`ExitHandler::all_parked`] tells when they have.
    pub fn pause(&self) {
        self.gate.close();
        self.kick();
    }

    /// Has none of them anything to do with the guest any more? Waits for it, but not longer than that.
    #[must_use]
    pub fn are_parked(&self, patience: Duration) -> bool {
        self.gate.all_outside(patience)
    }

    pub fn resume(&self) {
        self.gate.open();
    }

    /// Asks all to leave the guest for good; does not wait: one may hang on a console nobody reads.
    pub fn stop(&self) {
        self.gate.shut();
        self.kick();
    }

    fn kick(&self) {
        self.running.iter().for_each(VcpuHandle::kick);
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}
