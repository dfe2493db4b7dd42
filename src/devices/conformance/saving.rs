//! Every device behind both transports, in mid-flight: suspended and resumed in place, or saved and restored as another
//! one over the same memory. Nothing is lost or done twice, and its driver notices nothing.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::area;
use super::check_answers;
use super::driver::{Ring, memory};
use super::specimens::{Specimen, specimens};
use crate::virtio::feature;
use crate::virtio::mmio::tests::MmioDriver;
use crate::virtio::pci::tests::PciDriver;
use crate::virtio::state::OwnStateV1;
use crate::virtio::testing::{Driver, Register};

/// A device behind a transport, and what drives it.
struct Life<D> {
    driver: Option<D>,
    specimen: Box<dyn Specimen>,
    ring: Ring,
    made: u32,
    answered: u32,
}

impl<D: Driver> Life<D> {
    fn new(specimen: Box<dyn Specimen>, features: u64) -> Self {
        let device = specimen.device();
        let (features, queues) = (features & device.features() | feature::VERSION_1, device.queue_sizes().len());
        let ring = Ring::new(&memory(), specimen.queue(), 64, features);
        let mut driver = D::over(device, ring.ram.clone());
        driver.negotiate(features);
        driver.unmask(queues as u16);
        driver.set(Register::QueueSelect, ring.index.into());
        driver.set(Register::QueueSize, ring.layout.size.into());
        for (part, at) in (0..).zip([ring.layout.descriptors, ring.layout.avail, ring.layout.used]) {
            driver.set(Register::QueueAddress(part), at);
        }
        driver.set(Register::QueueReady, 1);
        driver.run();
        Self { driver: Some(driver), specimen, ring, made: 0, answered: 0 }
    }

    fn driver(&mut self) -> &mut D {
        self.driver.as_mut().unwrap()
    }

    fn make(&mut self, indirect: bool) {
        let buffers = self.specimen.prepare(&self.ring.ram, self.made, area(self.made));
        let slot = (self.made % 8) as u16 * 8;
        self.ring.chain(slot, &buffers, indirect);
        self.ring.publish(slot);
        self.specimen.provoke(self.made);
        self.made += 1;
    }

    fn kick(&mut self) {
        if self.ring.wants_kick() {
            let queue = self.ring.index;
            self.driver().notify(queue);
        }
    }

    fn suspend(&mut self) {
        let patience = Instant::now() + Duration::from_secs(30);
        self.driver().suspend(patience).unwrap();
    }

    /// Another device, which knows nothing but what is in the file.
    fn move_away(&mut self) {
        let saved = self.driver.take().unwrap().save().to_string();
        let saved: Value = serde_json::from_str(&saved).unwrap();
        let own: OwnStateV1 = serde_json::from_value(saved["core"]["own"].clone()).unwrap();
        let mut driver = D::over(self.specimen.device_again(&own), self.ring.ram.clone());
        driver.check(&saved).unwrap();
        driver.restore(&saved);
        assert_eq!(driver.save(), saved, "{}", self.specimen.name());
        self.driver = Some(driver);
    }

    /// Waits for some answers.
    fn settle(&mut self, count: u32) {
        let (driver, queue) = (self.driver.as_mut().unwrap(), self.ring.index);
        let settled = self.answered + count;
        let used = self.ring.wait_used_by(count as usize, || {
            let begun = Instant::now();
            while driver.heard(queue) == 0 {
                if begun.elapsed() > Duration::from_secs(5) {
                    return false;
                }
                std::thread::sleep(Duration::from_micros(20));
            }
            true
        });
        // There may be more than was waited for.
        let settled = settled.max(self.answered + used.len() as u32);
        check_answers(&mut *self.specimen, &self.ring.ram, self.answered..settled, &used);
        self.answered = settled;
    }
}

/// Each device with and without `EVENT_IDX`, and mergeable buffers where there are some.
fn lives<D: Driver>() -> impl Iterator<Item = Life<D>> {
    [u64::MAX, !feature::EVENT_IDX, !(1 << 15)]
        .into_iter()
        .flat_map(|mask| specimens().into_iter().map(move |specimen| Life::new(specimen, mask)))
}

/// What the driver has done when it is stopped, by turns: kicked for all, for some, for none; seen some answers.
fn nothing_is_lost<D: Driver>(moves: bool) {
    for mut life in lives::<D>().filter(|life| !moves || life.specimen.outlives_the_device()) {
        for round in 0..12 {
            for i in 0..8 {
                life.make(i % 2 == 0);
                if round % 3 == 0 || round % 3 == 1 && i < 4 {
                    life.kick();
                }
            }
            // Answers come in any order over io_uring, so that all of them or none are waited for.
            if round % 4 == 3 {
                life.kick();
                life.settle(8);
                life.make(false);
                life.kick();
            }
            for _ in 0..=round % 2 {
                life.suspend();
                let used = life.ring.used_index();
                if moves {
                    life.move_away();
                }
                assert_eq!(life.ring.used_index(), used, "nothing is done before it goes on");
                life.driver().resume();
            }
            // Drivers need not kick again for what they have kicked for.
            if round % 3 != 0 {
                life.kick();
            }
            life.settle(life.made - life.answered);
        }
        let name = life.specimen.name();
        assert_eq!(life.ring.used_index(), life.made as u16, "{name}: nothing was done twice");
    }
}

#[test]
fn nothing_is_lost_in_place_over_pci() {
    nothing_is_lost::<PciDriver>(false);
}

#[test]
fn nothing_is_lost_in_place_over_mmio() {
    nothing_is_lost::<MmioDriver>(false);
}

#[test]
fn nothing_is_lost_on_the_way_over_pci() {
    nothing_is_lost::<PciDriver>(true);
}

#[test]
fn nothing_is_lost_on_the_way_over_mmio() {
    nothing_is_lost::<MmioDriver>(true);
}

/// A driver that has masked its interrupt hears of it when it unmasks.
#[test]
fn what_is_masked_stays_pending() {
    for mut life in lives::<PciDriver>().filter(|life| life.specimen.outlives_the_device()) {
        let queue = life.ring.index;
        life.driver().mask(queue, true);
        for _ in 0..8 {
            life.make(false);
        }
        life.kick();
        let begun = Instant::now();
        while life.ring.used_index() < 8 {
            assert!(begun.elapsed() < Duration::from_secs(5), "{}", life.specimen.name());
            std::thread::yield_now();
        }
        life.suspend();
        let pending = life.driver().is_pending(queue);
        assert!(pending, "{}", life.specimen.name());
        life.move_away();
        assert!(life.driver().is_pending(queue));
        life.driver().resume();
        life.driver().mask(queue, false);
        assert!(!life.driver().is_pending(queue));
        assert_ne!(life.driver().heard(queue), 0);
        life.settle(8);
    }
}
