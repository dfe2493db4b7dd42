//! A request that hangs with its host: the device's transport can ask it to stop, and need not wait.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use super::driver::{Ring, memory, readable};
use crate::devices::Front;
use crate::devices::rng::NoConfig;
use crate::devices::worker::{Engine, Served, Turn, Worker, serve_each};
use crate::virtio::{Chain, DeviceKind, RingError, StillBusy, VirtioDevice, Virtqueue, feature};

/// Tells of each request, and ends it when it is let.
struct Hanging {
    begun: mpsc::SyncSender<()>,
    gate: Arc<Mutex<()>>,
}

impl Engine for Hanging {
    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        serve_each(queue, chain, turn, |_, _| {
            self.begun.send(()).unwrap();
            drop(self.gate.lock().unwrap());
            Ok(0)
        })
    }
}

#[test]
fn it_can_be_asked_to_stop() {
    let (begun, requests) = mpsc::sync_channel(8);
    let gate = Arc::<Mutex<()>>::default();
    let engine = Hanging { begun, gate: gate.clone() };
    let worker = Worker::spawn("hanging", Box::new(engine), &[(0, 64), (1, 64)]).unwrap();
    let mut device = Front::new(DeviceKind::Rng, "hanging".into(), feature::RING, NoConfig, vec![Box::new(worker)]);
    let mut ring = Ring::new(&memory(), 0, 64, feature::VERSION_1);
    for slot in 0..2 {
        ring.chain(slot, &[readable(0x10_0000, 16)], false);
        ring.publish(slot);
    }
    let hung = gate.lock().unwrap();
    ring.start(&mut device, None);
    requests.recv().unwrap();
    for _ in 0..3 {
        assert_eq!(device.stop_queue_within(0, Duration::from_millis(1)), Err(StillBusy));
        assert_eq!(device.stop_queue_within(1, Duration::ZERO), Ok(None), "what does not run need not wait");
    }
    drop(hung);
    // The second request is not begun any more.
    let state = device.stop_queue_within(0, Duration::MAX).unwrap().unwrap();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    assert_eq!(device.stop_queue_within(1, Duration::MAX), Ok(None));
    assert_eq!(device.stop_queue(0), None);
    assert!(requests.try_recv().is_err());

    // It serves again, and a stop without a limit takes over from one with.
    let hung = gate.lock().unwrap();
    ring.start(&mut device, Some(state));
    requests.recv().unwrap();
    assert_eq!(device.stop_queue_within(0, Duration::ZERO), Err(StillBusy));
    drop(hung);
    assert_eq!(device.stop_queue(0).unwrap().next_used, 2);
}

#[test]
fn a_stop_that_nobody_waits_for_any_more_is_taken_back() {
    let (begun, requests) = mpsc::sync_channel(8);
    let gate = Arc::<Mutex<()>>::default();
    let engine = Hanging { begun, gate: gate.clone() };
    let worker = Worker::spawn("hanging", Box::new(engine), &[(0, 64)]).unwrap();
    let mut device = Front::new(DeviceKind::Rng, "hanging".into(), feature::RING, NoConfig, vec![Box::new(worker)]);
    let mut ring = Ring::new(&memory(), 0, 64, feature::VERSION_1);
    let publish = |ring: &mut Ring, slot| {
        ring.chain(slot, &[readable(0x10_0000, 16)], false);
        ring.publish(slot);
    };
    publish(&mut ring, 0);
    publish(&mut ring, 1);
    let hung = gate.lock().unwrap();
    ring.start(&mut device, None);
    requests.recv().unwrap();
    for _ in 0..3 {
        assert_eq!(device.stop_queue_within(0, Duration::ZERO), Err(StillBusy));
        device.continue_queue(0);
    }
    drop(hung);
    assert_eq!(ring.wait_used(2).len(), 2);
    // Taken back when it was done already.
    let hung = gate.lock().unwrap();
    publish(&mut ring, 2);
    ring.kick();
    requests.recv().unwrap();
    requests.recv().unwrap();
    assert_eq!(device.stop_queue_within(0, Duration::ZERO), Err(StillBusy));
    publish(&mut ring, 3);
    drop(hung);
    assert_eq!(ring.wait_used(1).len(), 1);
    device.continue_queue(0);
    assert_eq!(ring.wait_used(1).len(), 1);
    let state = device.stop_queue(0).unwrap();
    assert_eq!((state.next_avail, state.next_used), (4, 4));
    // What has been stopped and asked for stays so.
    device.continue_queue(0);
    assert_eq!(device.stop_queue(0), None);
}

#[test]
fn another_engine_waits_for_it_and_nobody_else_does() {
    let (begun, requests) = mpsc::sync_channel(8);
    let gate = Arc::<Mutex<()>>::default();
    let engine = || Box::new(Hanging { begun: begun.clone(), gate: gate.clone() });
    let worker = Worker::spawn("hanging", engine(), &[(0, 64)]).unwrap();
    let line = worker.line();
    let mut device = Front::new(DeviceKind::Rng, "hanging".into(), feature::RING, NoConfig, vec![Box::new(worker)]);
    let mut ring = Ring::new(&memory(), 0, 64, feature::VERSION_1);
    for slot in 0..2 {
        ring.chain(slot, &[readable(0x10_0000, 16)], false);
        ring.publish(slot);
    }
    let hung = gate.lock().unwrap();
    ring.start(&mut device, None);
    requests.recv().unwrap();
    let (moved, movements) = mpsc::sync_channel(8);
    line.exchange(engine(), Box::new(move || moved.send(()).unwrap())).unwrap();
    assert!(movements.try_recv().is_err());
    assert_eq!(device.stop_queue_within(0, Duration::ZERO), Err(StillBusy), "in the meantime it can be asked to stop");
    drop(hung);
    movements.recv().unwrap();
    let state = device.stop_queue(0).unwrap();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    ring.start(&mut device, Some(state));
    requests.recv().unwrap();
    assert_eq!(ring.wait_used(2).len(), 2);
    drop(device);
    assert!(line.exchange(engine(), Box::new(|| ())).is_err(), "there is no thread any more");
}
