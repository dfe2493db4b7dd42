use std::sync::{Mutex, MutexGuard};

use std::time::Instant;

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use super::*;
use crate::virtio::core::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, NEEDS_RESET};
use crate::virtio::feature;
use crate::virtio::testing::{Driver, FakeDevice, FakeHost, QUEUES, Register, Served, mmio, mmio_of, ram};
use crate::virtio::{StateError, StillBusy};

const ADDRESS: u64 = 0xc000_2000;
const BELL: u64 = ADDRESS + 0x50;

pub struct MmioDriver {
    device: VirtioMmio,
    host: Arc<FakeHost>,
    served: Arc<Mutex<Served>>,
    line: EventFd,
}

impl MmioDriver {
    pub fn new() -> Self {
        let (device, host, served, line) = mmio(ADDRESS);
        Self { device, host, served, line }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.device.registers_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.device.registers_write(offset, &value.to_le_bytes());
    }

    /// Pulses of the line since the last look.
    fn pulses(&self) -> u64 {
        self.line.read().unwrap_or(0)
    }
}

/// What a file would hold.
fn parse(state: &Value) -> Result<MmioStateV1, StateError> {
    MmioStateV1::deserialize(state).map_err(|error| StateError::new("json", error.to_string()))
}

impl Driver for MmioDriver {
    fn over(device: Box<dyn VirtioDevice>, ram: Ram) -> Self {
        let (device, host, line) = mmio_of(device, ram, ADDRESS);
        Self { device, host, served: Arc::default(), line }
    }

    fn of_fake(served: Arc<Mutex<Served>>) -> Self {
        let driver = Self::over(Box::new(FakeDevice(served.clone())), ram());
        Self { served, ..driver }
    }

    fn notify(&mut self, queue: u16) {
        self.write(0x50, queue.into());
    }

    fn unmask(&mut self, _queues: u16) {}

    fn heard(&mut self, _queue: u16) -> u64 {
        let pulses = self.pulses();
        self.write(0x64, 1);
        pulses
    }

    fn suspend(&mut self, deadline: Instant) -> Result<(), StillBusy> {
        self.device.suspend(deadline)
    }

    fn resume(&mut self) {
        self.device.resume();
    }

    fn save(&self) -> Value {
        serde_json::to_value(self.device.save()).unwrap()
    }

    fn check(&self, state: &Value) -> Result<(), StateError> {
        self.device.check(&parse(state)?)
    }

    fn restore(&mut self, state: &Value) {
        self.device.restore(&parse(state).unwrap()).unwrap();
    }

    fn get(&mut self, register: Register) -> u64 {
        let offset = match register {
            Register::DeviceFeatures => 0x10,
            Register::Status => 0x70,
            Register::Generation => 0xfc,
            Register::QueueSize => 0x34,
            Register::QueueReady => 0x44,
            write_only => panic!("{write_only:?} cannot be read here"),
        };
        self.read(offset).into()
    }

    fn set(&mut self, register: Register, value: u64) {
        let offset = match register {
            Register::DeviceFeatureSelect => 0x14,
            Register::DeviceFeatures => 0x10,
            Register::DriverFeatureSelect => 0x24,
            Register::DriverFeatures => 0x20,
            Register::Status => 0x70,
            Register::Generation => 0xfc,
            Register::QueueSelect => 0x30,
            Register::QueueSize => 0x38,
            Register::QueueReady => 0x44,
            Register::QueueAddress(index) => {
                let at = 0x80 + 0x10 * u64::from(index);
                self.write(at + 4, (value >> 32) as u32);
                at
            }
        };
        self.write(offset, value as u32);
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap()
    }
}

fn running() -> MmioDriver {
    let mut driver = MmioDriver::new();
    driver.negotiate(feature::VERSION_1);
    driver.enable(0, 0x1000);
    driver.enable(1, 0x8000);
    driver.run();
    driver
}

#[test]
fn it_says_what_it_is() {
    let mut driver = MmioDriver::new();
    assert_eq!([0, 4, 8].map(|at| driver.read(at)), [0x7472_6976, 2, 4]);
    assert_eq!((driver.read(0xb0), driver.read(0xb4)), (u32::MAX, u32::MAX), "no shared memory");
    let mut config = [0; 20];
    driver.device.registers_read(0x100, &mut config);
    assert_eq!(&config, b"configuration\0\0\0\0\0\0\0");
    driver.device.registers_read(0x10c, &mut config[..2]);
    assert_eq!(&config[..2], b"n\0", "any width, any offset");
}

#[test]
fn registers_take_aligned_words_and_nothing_else() {
    let mut driver = MmioDriver::new();
    for (offset, data) in
        [(0x70, &[1u8][..]), (0x70, &[1, 0]), (0x70, &[1, 0, 0, 0, 0, 0, 0, 0]), (0x71, &[1; 4]), (0x6f, &[1; 4])]
    {
        driver.device.registers_write(offset, data);
        assert_eq!(driver.status(), 0, "{} bytes at {offset:#x}", data.len());
    }
    for (offset, width) in [(0, 1), (0, 2), (2, 2), (0, 8), (1, 4)] {
        let mut data = vec![0xff; width];
        driver.device.registers_read(offset, &mut data);
        assert_eq!(data, vec![0; width], "{width} bytes at {offset:#x}");
    }
    // Numbers with bits beyond those that exist are not taken for what their lower bits say.
    driver.set_status(ACKNOWLEDGE | DRIVER);
    driver.write(0x70, 0x100);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    driver.write(0x30, 0x1_0000);
    assert_eq!(driver.read(0x34), 0, "no such queue");
}

#[test]
fn a_queue_that_cannot_be_needs_a_reset() {
    for (size, at) in [(0, 0x1000), (3, 0x1000), (128, 0x1000), (0x1_0040, 0x1000), (64, 0x1001), (64, 0x10_0000)] {
        let mut driver = MmioDriver::new();
        driver.negotiate(feature::VERSION_1);
        driver.set(Register::QueueSize, size);
        driver.enable(0, at);
        assert_ne!(driver.run() & NEEDS_RESET, 0, "{size} at {at:#x}");
        assert_eq!((driver.pulses(), driver.read(0x60)), (1, 2), "the driver is told");
        assert_eq!(driver.set_status(0), 0);
        assert_eq!(driver.read(0x60), 0);
        driver.negotiate(feature::VERSION_1);
        driver.enable(0, 0x1000);
        assert_eq!(driver.run() & NEEDS_RESET, 0, "and a reset mends it");
    }
}

#[test]
fn interrupts_stay_until_they_are_acknowledged() {
    let mut driver = running();
    let events = driver.events();
    events.queue_interrupt(0);
    events.queue_interrupt(1);
    assert_eq!((driver.pulses(), driver.read(0x60), driver.read(0x60)), (2, 1, 1));
    events.config_changed();
    driver.write(0x64, 1);
    assert_eq!((driver.pulses(), driver.read(0x60)), (1, 2));
    driver.write(0x64, !0);
    assert_eq!(driver.read(0x60), 0);
    events.queue_interrupt(0);
    driver.set_status(0);
    assert_eq!(driver.read(0x60), 0, "no notification after a reset");
    driver.pulses();
    events.config_changed();
    assert_eq!((driver.pulses(), driver.read(0x60)), (0, 0), "and none without a driver");
}

#[test]
fn a_queue_stops_when_it_is_not_ready() {
    let mut driver = running();
    driver.set(Register::QueueSelect, 1);
    driver.set(Register::QueueReady, 0);
    assert_eq!(driver.get(Register::QueueReady), 0, "which a driver waits for");
    assert_eq!(driver.running(), [Some(feature::VERSION_1), None]);
    driver.set(Register::QueueSize, 8);
    driver.enable(1, 0x8000);
    assert_eq!(driver.running(), [Some(feature::VERSION_1); 2]);
}

#[test]
fn doorbells_wait_for_a_driver_and_go_with_the_device() {
    let mut driver = MmioDriver::new();
    driver.negotiate(feature::VERSION_1);
    assert_eq!(driver.host.doorbells(), []);
    driver.run();
    assert_eq!(driver.host.doorbells(), [(BELL, Some(0)), (BELL, Some(1))]);
    driver.set_status(0);
    driver.negotiate(feature::VERSION_1);
    driver.enable(0, 0x1000);
    driver.run();
    let MmioDriver { device, host, served, .. } = driver;
    drop(device);
    assert_eq!(host.doorbells(), []);
    assert_eq!(served.lock().unwrap().running, [None, None]);
}

proptest! {
    /// Whatever a guest does: nothing panics, and queues run only under a driver.
    #[test]
    fn no_access_breaks_the_device(
        accesses in prop::collection::vec(
            (
                prop_oneof![(0u64..0x44).prop_map(|word| word * 4), 0u64..0x120, 0..REGISTERS_SIZE],
                prop_oneof![Just(4usize), prop::sample::select(vec![1usize, 2, 4, 8])],
                prop_oneof![0u64..16, any::<u64>()],
            ),
            0..200,
        ),
    ) {
        let mut driver = MmioDriver::new();
        for (at, width, value) in accesses {
            driver.device.registers_write(at, &value.to_le_bytes()[..width]);
            driver.device.registers_read(at, &mut vec![0; width]);
            if driver.status() & DRIVER_OK == 0 {
                prop_assert_eq!(driver.running(), [None, None]);
            }
            for queue in 0..QUEUES.len() as u64 {
                if driver.running()[queue as usize].is_some() {
                    driver.set(Register::QueueSelect, queue);
                    prop_assert_eq!(driver.get(Register::QueueReady), 1);
                }
            }
        }
    }
}

#[test]
fn a_queue_is_ready_until_it_has_stopped() {
    let mut driver = running();
    driver.set(Register::QueueSelect, 0);
    driver.set_busy(true);
    driver.set(Register::QueueReady, 0);
    driver.set(Register::QueueAddress(0), 0x8000);
    driver.set(Register::QueueReady, 1);
    assert_eq!(driver.get(Register::QueueReady), 1);
    driver.set_busy(false);
    assert_eq!(driver.get(Register::QueueReady), 0);
    assert_eq!(driver.running()[0], None);
    driver.enable(0, 0x8000);
    assert!(driver.running()[0].is_some());
}

#[test]
fn what_was_not_acknowledged_is_told_again_after_a_move() {
    let mut driver = running();
    driver.events().config_changed();
    driver.pulses();
    driver.suspend(Instant::now()).unwrap();
    let state = driver.save();
    drop(driver);
    let mut driver = MmioDriver::new();
    driver.restore(&state);
    assert_eq!(driver.host.doorbells(), [(BELL, Some(0)), (BELL, Some(1))]);
    assert_eq!((driver.pulses(), driver.read(0x60)), (0, 2), "not before it goes on");
    driver.resume();
    assert_eq!(driver.read(0x60), 3);
    assert_ne!(driver.pulses(), 0);
    driver.write(0x64, 3);
    driver.suspend(Instant::now()).unwrap();
    driver.resume();
    assert_eq!((driver.pulses(), driver.read(0x60)), (0, 0));
}
