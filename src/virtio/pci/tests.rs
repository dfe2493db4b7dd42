//! The function as a driver meets it: through its configuration space and its BAR alone.

use std::sync::{Arc, Mutex, MutexGuard};

use std::time::Instant;

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use super::*;
use crate::virtio::core::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, NEEDS_RESET};
use crate::virtio::feature;
use crate::virtio::testing::{Driver, FakeDevice, FakeHost, QUEUES, Register, Served, function, function_of, ram};
use crate::virtio::{StateError, StillBusy};

const BAR: u64 = 0xd000_0000;

pub struct PciDriver {
    function: VirtioPci,
    host: Arc<FakeHost>,
    served: Arc<Mutex<Served>>,
}

/// Offsets of the common configuration.
const STATUS: u64 = 0x14;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_DESC: u64 = 0x20;

/// What a file would hold.
fn parse(state: &Value) -> Result<PciStateV1, StateError> {
    PciStateV1::deserialize(state).map_err(|error| StateError::new("json", error.to_string()))
}

impl Driver for PciDriver {
    fn over(device: Box<dyn VirtioDevice>, ram: Ram) -> Self {
        let (function, host) = function_of(device, ram, BAR);
        Self { function, host, served: Arc::default() }
    }

    fn of_fake(served: Arc<Mutex<Served>>) -> Self {
        let driver = Self::over(Box::new(FakeDevice(served.clone())), ram());
        Self { served, ..driver }
    }

    fn notify(&mut self, queue: u16) {
        self.write::<2>(0x3000 + 4 * u64::from(queue), queue.into());
    }

    fn unmask(&mut self, queues: u16) {
        self.set_msix_control(MSIX_ON);
        self.write::<2>(0x10, 0);
        for vector in 0..=queues {
            self.set_entry(vector.into(), MESSAGE, false);
        }
        for queue in 0..queues {
            self.write::<2>(0x16, queue.into());
            self.write::<2>(QUEUE_VECTOR, u64::from(queue) + 1);
        }
    }

    fn heard(&mut self, queue: u16) -> u64 {
        self.host.sent(u32::from(queue) + 1)
    }

    fn suspend(&mut self, deadline: Instant) -> Result<(), StillBusy> {
        self.function.suspend(deadline)
    }

    fn resume(&mut self) {
        self.function.resume();
    }

    fn save(&self) -> Value {
        serde_json::to_value(self.function.save()).unwrap()
    }

    fn check(&self, state: &Value) -> Result<(), StateError> {
        self.function.check(&parse(state)?)
    }

    fn restore(&mut self, state: &Value) {
        let bar = self.function.restore(&parse(state).unwrap()).unwrap();
        self.function.map_doorbells(bar);
    }

    fn get(&mut self, register: Register) -> u64 {
        match register {
            Register::DeviceFeatureSelect => self.read::<4>(0x00),
            Register::DeviceFeatures => self.read::<4>(0x04),
            Register::DriverFeatureSelect => self.read::<4>(0x08),
            Register::DriverFeatures => self.read::<4>(0x0c),
            Register::Status => self.read::<1>(STATUS),
            Register::Generation => self.read::<1>(0x15),
            Register::QueueSelect => self.read::<2>(0x16),
            Register::QueueSize => self.read::<2>(QUEUE_SIZE),
            Register::QueueReady => self.read::<2>(0x1c),
            Register::QueueAddress(index) => self.read::<8>(QUEUE_DESC + 8 * u64::from(index)),
        }
    }

    fn set(&mut self, register: Register, value: u64) {
        match register {
            Register::DeviceFeatureSelect => self.write::<4>(0x00, value),
            Register::DeviceFeatures => self.write::<4>(0x04, value),
            Register::DriverFeatureSelect => self.write::<4>(0x08, value),
            Register::DriverFeatures => self.write::<4>(0x0c, value),
            Register::Status => self.write::<1>(STATUS, value),
            Register::Generation => self.write::<1>(0x15, value),
            Register::QueueSelect => self.write::<2>(0x16, value),
            Register::QueueSize => self.write::<2>(QUEUE_SIZE, value),
            Register::QueueReady => self.write::<2>(0x1c, value),
            Register::QueueAddress(index) => self.write::<8>(QUEUE_DESC + 8 * u64::from(index), value),
        }
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap()
    }
}

impl PciDriver {
    pub fn new() -> Self {
        let (function, host, served) = function(BAR);
        Self { function, host, served }
    }

    fn read<const N: usize>(&mut self, offset: u64) -> u64 {
        let mut data = [0xff; N];
        self.function.bar_read(offset, &mut data);
        data.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    fn write<const N: usize>(&mut self, offset: u64, value: u64) {
        self.function.bar_write(offset, &value.to_le_bytes()[..N]);
    }

    fn config_read(&mut self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The message control register; it is the upper half of the capability's first word.
    fn set_msix_control(&mut self, control: u16) {
        let at = self.capabilities().into_iter().find(|&(id, _)| id == 0x11).unwrap().1;
        self.function.config_write(at + 2, &control.to_le_bytes());
    }

    /// Each capability's ID and where it is.
    fn capabilities(&mut self) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        let mut at = self.config_read(0x34) as u16 & 0xff;
        while at != 0 {
            let word = self.config_read(at);
            found.push((word as u8, at));
            at = (word >> 8) as u16 & 0xff;
        }
        found
    }

    /// Masks the vector that [`Driver::unmask`] gave to a queue, or unmasks it.
    pub fn mask(&mut self, queue: u16, masked: bool) {
        self.write::<4>(MSIX_TABLE + 16 * (u64::from(queue) + 1) + 12, masked.into());
    }

    pub fn is_pending(&mut self, queue: u16) -> bool {
        self.read::<8>(MSIX_PBA) & 2 << queue != 0
    }

    fn set_entry(&mut self, vector: u64, message: MsiMessage, masked: bool) {
        let at = MSIX_TABLE + 16 * vector;
        self.write::<8>(at, message.address);
        self.write::<4>(at + 8, message.data.into());
        self.write::<4>(at + 12, masked.into());
    }
}

const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x41 };
const MSIX_ON: u16 = 1 << 15;
const MSIX_ALL_MASKED: u16 = 1 << 14;

#[test]
fn the_capabilities_name_structures_within_the_bar() {
    let mut driver = PciDriver::new();
    let mut kinds = Vec::new();
    for (id, at) in driver.capabilities() {
        if id == config_space::VENDOR_SPECIFIC {
            let kind = (driver.config_read(at) >> 24) as u8;
            let (bar, offset, length) =
                (driver.config_read(at + 4) & 0xff, driver.config_read(at + 8), driver.config_read(at + 12));
            assert_eq!(bar, 0);
            assert!(u64::from(offset) + u64::from(length) <= BAR_SIZE);
            kinds.push(kind);
        } else {
            assert_eq!(id, 0x11);
            assert_eq!(driver.config_read(at) >> 16, QUEUES.len() as u32, "a vector more than queues, less one");
        }
    }
    kinds.sort_unstable();
    assert_eq!(kinds, [CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_WINDOW]);
}

#[test]
fn the_window_reaches_the_bar_and_nothing_else() {
    let mut driver = PciDriver::new();
    let capabilities = driver.capabilities();
    let at = capabilities.into_iter().map(|(_, at)| at).find(|&at| driver.config_read(at) >> 24 == 5).unwrap();
    let aim = |driver: &mut PciDriver, bar: u8, offset: u32, length: u32| {
        driver.function.config_write(at + 4, &[bar]);
        driver.function.config_write(at + 8, &offset.to_le_bytes());
        driver.function.config_write(at + 12, &length.to_le_bytes());
    };
    let data = at + 16;
    aim(&mut driver, 0, STATUS as u32, 1);
    driver.function.config_write(data, &[ACKNOWLEDGE]);
    assert_eq!(driver.status(), ACKNOWLEDGE);
    driver.set_status(ACKNOWLEDGE | DRIVER);
    assert_eq!(driver.config_read(data) as u8, ACKNOWLEDGE | DRIVER);
    aim(&mut driver, 0, 0x2000, 4);
    assert_eq!(driver.config_read(data).to_le_bytes(), *b"conf");

    for (bar, offset, length) in
        [(1, 0x14, 1), (0, 0x14, 0), (0, 0x14, 3), (0, 0x14, 8), (0, 0x15, 2), (0, BAR_SIZE as u32, 1), (0, !3, 4)]
    {
        aim(&mut driver, bar, offset, length);
        driver.function.config_write(data, &[0; 4]);
        assert_eq!(driver.config_read(data), 0, "BAR {bar}, {length} at {offset:#x}");
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    }
}

#[test]
fn addresses_go_by_halves_and_queues_that_are_not_there_take_nothing() {
    let mut driver = PciDriver::new();
    for (at, half) in [(0, 0x1111_1000), (4, 0x22), (8, 0x3333_3000), (12, 0x44), (16, 0x5555_5000), (20, 0x66)] {
        driver.write::<4>(QUEUE_DESC + at, half);
    }
    let registers = [0, 8, 16].map(|at| driver.read::<8>(QUEUE_DESC + at));
    assert_eq!(registers, [0x22_1111_1000, 0x44_3333_3000, 0x66_5555_5000]);
    assert_eq!(driver.read::<4>(QUEUE_DESC + 12), 0x44);

    driver.set(Register::QueueSelect, 2);
    assert_eq!(driver.read::<2>(QUEUE_SIZE), 0, "no such queue");
    driver.enable(2, 0x1000);
    driver.write::<2>(QUEUE_VECTOR, 0);
    assert_eq!((driver.get(Register::QueueReady), driver.read::<2>(QUEUE_VECTOR)), (0, 0xffff));
    driver.write::<2>(0x10, 3);
    assert_eq!(driver.read::<2>(0x10), 0xffff, "no such vector");
    driver.write::<2>(0x10, 2);
    assert_eq!(driver.read::<2>(0x10), 2);
}

#[test]
fn a_queue_that_cannot_be_needs_a_reset() {
    for (size, at) in [(0, 0x1000), (3, 0x1000), (128, 0x1000), (64, 0x1001), (64, 0x10_0000), (64, u64::MAX - 0x2fff)]
    {
        let mut driver = PciDriver::new();
        driver.set_msix_control(MSIX_ON);
        driver.set_entry(2, MESSAGE, false);
        driver.write::<2>(0x10, 2);
        driver.negotiate(feature::VERSION_1);
        driver.write::<2>(QUEUE_SIZE, size);
        driver.enable(0, at);
        assert_ne!(driver.run() & NEEDS_RESET, 0, "{size} at {at:#x}");
        assert_eq!(driver.host.sent(2), 1, "the driver is told by the configuration's vector");
        assert_eq!(driver.read::<1>(0x1000), 2, "and by the ISR");
        assert_eq!(driver.set_status(0), 0);
        driver.negotiate(feature::VERSION_1);
        driver.enable(0, 0x1000);
        assert_eq!(driver.run() & NEEDS_RESET, 0, "and a reset mends it");
    }
}

#[test]
fn a_masked_vector_keeps_its_interrupt() {
    let mut driver = PciDriver::new();
    driver.negotiate(feature::VERSION_1);
    driver.enable(0, 0x1000);
    driver.write::<2>(QUEUE_VECTOR, 1);
    driver.run();
    let events = driver.events();

    driver.set_entry(1, MESSAGE, true);
    driver.set_msix_control(MSIX_ON);
    events.queue_interrupt(0);
    assert_eq!(driver.host.connected().len(), 0);
    assert_eq!(
        (driver.read::<4>(MSIX_PBA), driver.read::<4>(MSIX_PBA)),
        (2, 2),
        "pending, and looking changes nothing"
    );
    driver.write::<4>(MSIX_TABLE + 16 + 12, 0);
    assert_eq!(driver.host.connected().into_iter().collect::<Vec<_>>(), [(1, MESSAGE)]);
    assert_eq!(driver.host.sent(1), 1);
    assert_eq!(driver.read::<4>(MSIX_PBA), 0);

    driver.set_msix_control(MSIX_ON | MSIX_ALL_MASKED);
    events.queue_interrupt(0);
    assert_eq!((driver.host.connected().len(), driver.read::<4>(MSIX_PBA)), (0, 2));
    let moved = MsiMessage { data: 0x42, ..MESSAGE };
    driver.set_entry(1, moved, false);
    driver.set_msix_control(MSIX_ON);
    assert_eq!(driver.host.connected().into_iter().collect::<Vec<_>>(), [(1, moved)]);
    assert_eq!(driver.host.sent(1), 1, "to where it goes now");

    // Without a vector there is the ISR.
    driver.write::<2>(QUEUE_VECTOR, 0xffff);
    events.queue_interrupt(0);
    events.config_changed();
    assert_eq!((driver.read::<1>(0x1000), driver.read::<1>(0x1000)), (3, 0));
    assert_eq!(driver.read::<1>(0x15), 1, "the configuration's generation");
}

#[test]
fn a_reset_takes_pending_interrupts_with_it() {
    let mut driver = PciDriver::new();
    let features = driver.offered();
    driver.negotiate(features);
    driver.enable(0, 0);
    driver.write::<2>(QUEUE_VECTOR, 1);
    driver.run();
    driver.set_msix_control(MSIX_ON);
    driver.events().queue_interrupt(0);
    assert_eq!(driver.read::<8>(MSIX_PBA), 1 << 1);
    driver.set_status(0);
    assert_eq!(driver.read::<8>(MSIX_PBA), 0, "no notification after a reset");
}

#[test]
fn nothing_is_left_of_a_function_that_goes() {
    let mut driver = PciDriver::new();
    driver.set_msix_control(MSIX_ON);
    driver.set_entry(0, MESSAGE, false);
    driver.function.map_doorbells(Some(BAR));
    driver.negotiate(feature::VERSION_1);
    driver.enable(0, 0x1000);
    driver.run();
    assert_eq!(driver.host.doorbells(), [(BAR + 0x3000, None), (BAR + 0x3004, None)]);
    let PciDriver { function, host, served } = driver;
    drop(function);
    assert_eq!((host.doorbells().len(), host.connected().len(), host.routes()), (0, 0, 0));
    assert_eq!(served.lock().unwrap().running, [None, None]);
}

#[derive(Debug, Clone)]
enum Access {
    Config { at: u16, data: Vec<u8> },
    Bar { at: u64, data: Vec<u8> },
}

fn access() -> impl Strategy<Value = Access> {
    let data = prop::sample::select(vec![1usize, 2, 4, 8]).prop_flat_map(|width| {
        // Small numbers get further than noise does.
        prop_oneof![
            prop::collection::vec(any::<u8>(), width),
            (0u64..40).prop_map(move |n| n.to_le_bytes()[..width].to_vec())
        ]
    });
    let bar = prop_oneof![
        0u64..0x40,
        0x1000u64..0x1008,
        0x2000u64..0x2020,
        0x3000u64..0x3020,
        0x4000u64..0x4040,
        0x6000u64..0x6010,
        0..BAR_SIZE
    ];
    prop_oneof![
        (prop_oneof![0u16..0x100, 0u16..0x1000], data.clone()).prop_map(|(at, data)| Access::Config { at, data }),
        (bar, data).prop_map(|(at, data)| Access::Bar { at, data }),
    ]
}

proptest! {
    /// Whatever a guest does: nothing panics, KVM listens to exactly what is unmasked, queues run only under a
    /// driver.
    #[test]
    fn no_access_breaks_the_function(accesses in prop::collection::vec(access(), 0..200)) {
        let mut driver = PciDriver::new();
        for access in accesses {
            match access {
                Access::Config { at, data } => {
                    driver.function.config_write(at, &data);
                    driver.function.config_read(at, &mut vec![0; data.len()]);
                    let bar = driver.function.bar_address();
                    driver.function.map_doorbells(bar);
                    let doorbells: Vec<_> =
                        bar.into_iter().flat_map(|bar| [(bar + 0x3000, None), (bar + 0x3004, None)]).collect();
                    prop_assert_eq!(driver.host.doorbells(), doorbells);
                }
                Access::Bar { at, data } => {
                    driver.function.bar_write(at, &data);
                    driver.function.bar_read(at, &mut vec![0; data.len()]);
                }
            }
            let control = driver.function.config.msix_control().unwrap();
            for vector in 0..=QUEUES.len() as u64 {
                let [address, rest] = [0, 8].map(|at| driver.read::<8>(MSIX_TABLE + 16 * vector + at));
                let unmasked = control & (MSIX_ON | MSIX_ALL_MASKED) == MSIX_ON && rest >> 32 & 1 == 0;
                let message = MsiMessage { address: address & !3, data: rest as u32 };
                prop_assert_eq!(driver.host.connected().remove(&(vector as u32)), unmasked.then_some(message));
            }
            if driver.status() & DRIVER_OK == 0 {
                prop_assert_eq!(driver.running(), [None, None]);
            }
        }
    }
}

#[test]
fn a_function_is_the_same_after_a_move() {
    let mut driver = PciDriver::new();
    driver.negotiate(feature::VERSION_1);
    driver.unmask(1);
    driver.enable(0, 0x1000);
    driver.enable(1, 0x8000);
    driver.function.config_write(0x10, &0xd100_0000u32.to_le_bytes());
    driver.function.config_write(0x04, &[6, 4]);
    driver.function.config_write(0x3c, &[9]);
    driver.function.map_doorbells(driver.function.bar_address());
    // One more vector, masked; and a queue that has none.
    let other = MsiMessage { address: 0xfee0_2000, data: 0x99 };
    driver.set_entry(2, other, true);
    driver.run();
    driver.write::<2>(0x16, 1);
    driver.write::<2>(QUEUE_VECTOR, 2);
    let events = driver.events();
    events.queue_interrupt(1);
    events.config_changed();
    driver.suspend(Instant::now()).unwrap();
    let state = driver.function.save();
    assert_eq!(state.vectors.iter().map(|vector| vector.pending).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!((state.config_vector, &state.queue_vectors[..], state.mapped), (0, &[1, 2][..], true));
    let connected = driver.host.connected();
    drop(driver);

    let mut driver = PciDriver::new();
    driver.function.check(&state).unwrap();
    let bar = driver.function.restore(&state).unwrap();
    assert_eq!(bar, Some(0xd100_0000));
    assert_eq!((driver.config_read(0x04) as u16, driver.config_read(0x3c) as u8), (0x406, 9));
    assert_eq!(driver.host.connected(), connected);
    assert_eq!(driver.read::<8>(MSIX_PBA), 0b100);
    assert_eq!(driver.read::<8>(MSIX_TABLE + 32), other.address);
    assert_eq!(driver.read::<1>(0x1000), 2, "the ISR says that the configuration has changed");
    driver.set_entry(2, other, false);
    assert_eq!((driver.host.sent(2), driver.host.sent(1)), (1, 0), "what was pending is sent");
    driver.resume();
    assert_eq!([0, 1, 2].map(|vector| driver.host.sent(vector)), [0, 1, 1]);
}

#[test]
fn each_rule_of_a_functions_state_has_its_error() {
    let mut driver = PciDriver::new();
    driver.unmask(2);
    driver.suspend(Instant::now()).unwrap();
    let good = driver.function.save();
    let refused = |what: fn(&mut PciStateV1)| {
        let mut state = good.clone();
        what(&mut state);
        PciDriver::new().function.check(&state).unwrap_err().to_string()
    };
    assert_eq!(refused(|state| state.config.truncate(255)), "config: 255 bytes, and not 256");
    assert_eq!(
        refused(|state| state.config[2] = 0x41),
        "config: byte 0x2 is 0x41, which is not this device's and cannot be written"
    );
    assert_eq!(refused(|state| state.mapped = true), "mapped: the BAR is not decoded");
    assert_eq!(refused(|state| state.vectors.truncate(2)), "vectors: there are 2, and the device has 3");
    assert_eq!(refused(|state| state.queue_vectors.push(1)), "queue_vectors: there are 3, and the device has 2");
    for set in [|state: &mut PciStateV1| state.config_vector = 3, |state: &mut PciStateV1| state.queue_vectors[1] = 3] {
        assert_eq!(refused(set), "config_vector, queue_vectors: 3 is neither below 3 nor 65535 for none");
    }
}
