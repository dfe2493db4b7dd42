//! Saved states of devices, from files that anybody may have written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use vm_memory::GuestAddress;

use super::input::Input;
use super::machine::{Host, devices, eventfd};
use super::queues::MEMORY;
use crate::memory::anonymous;
use crate::platform::layout;
use crate::platform::pci::PciRoot;
use crate::virtio::core::state::CoreStateV1;
use crate::virtio::mmio::VirtioMmio;
use crate::virtio::pci::VirtioPci;

/// A state as a file has it.
fn parse<T: DeserializeOwned>(text: &[u8]) -> Option<T> {
    serde_json::from_slice(text).ok()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// It is what it was, but for what the host has changed since: a disk may have grown, a cable be in.
fn assert_same(now: &CoreStateV1, saved: &CoreStateV1) {
    let now = CoreStateV1 { own: saved.own.clone(), ..now.clone() };
    assert_eq!(now, *saved);
}

/// Restores a device: a byte for which of a machine's devices it is, and whether behind PCI; then its state, as JSON.
pub fn states(input: &[u8]) {
    let mut input = Input(input);
    let _ = restore(&mut input);
}

/// Returns whether the device goes on from the state.
pub fn restore(input: &mut Input<'_>) -> Option<bool> {
    let which = input.u8()?;
    let ram = anonymous(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
    let (mut devices, _network) = devices();
    let device = Box::new(devices.remove(usize::from(which >> 1) % devices.len()));
    let host = Arc::<Host>::default();
    if which & 1 == 0 {
        let state = parse(input.0)?;
        let mut function = VirtioPci::new(device, ram, host, PciRoot::initial_bar(1)).expect("a function");
        if function.check(&state).is_err() {
            return Some(false);
        }
        let bar = function.restore(&state).expect("what has been checked can be taken up");
        function.map_doorbells(bar);
        assert_same(&function.save().core, &state.core);
        function.resume();
        function.suspend(soon()).expect("nothing hangs");
        function.check(&function.save()).expect("what was restored can be saved");
    } else {
        let state = parse(input.0)?;
        let mut device = VirtioMmio::new(device, ram, host, layout::VIRTIO_MMIO, eventfd()).expect("a device");
        if device.check(&state).is_err() {
            return Some(false);
        }
        device.restore(&state).expect("what has been checked can be taken up");
        assert_same(&device.save().core, &state.core);
        device.resume();
        device.suspend(soon()).expect("nothing hangs");
        device.check(&device.save()).expect("what was restored can be saved");
    }
    Some(true)
}
