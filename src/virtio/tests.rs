//! What a driver meets on either transport.

use super::core::status::{DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use super::feature;
use super::mmio::tests::MmioDriver;
use super::pci::tests::PciDriver;
use super::testing::{Driver, OWN_FEATURE, QUEUES, Register};

/// Runs a test over both.
macro_rules! on_both {
    ($($(#[$meta:meta])* $name:ident)*) => {
        mod pci {
            $(#[test] $(#[$meta])* fn $name() { super::$name(super::PciDriver::new) })*
        }
        mod mmio {
            $(#[test] $(#[$meta])* fn $name() { super::$name(super::MmioDriver::new) })*
        }
    };
}

on_both! {
    features_are_what_both_sides_know
    queues_start_with_the_driver_and_end_with_a_reset
    the_status_only_grows_until_it_is_reset
    queues_that_are_not_there_take_nothing
    the_generation_follows_the_configuration
    a_reset_does_not_wait_for_a_request_that_hangs
}

fn features_are_what_both_sides_know<D: Driver>(new: fn() -> D) {
    let mut driver = new();
    let offered = driver.offered();
    assert_eq!(offered, feature::RING | OWN_FEATURE);
    driver.set(Register::DeviceFeatureSelect, 2);
    assert_eq!(driver.get(Register::DeviceFeatures), 0, "there are 64 bits");

    for (features, ok) in
        [(0, false), (OWN_FEATURE, false), (offered | 1 << 40, false), (feature::VERSION_1, true), (offered, true)]
    {
        driver.set_status(0);
        driver.negotiate(features);
        assert_eq!(driver.status() & FEATURES_OK != 0, ok, "{features:#x}");
        driver.enable(0, 0x1000);
        assert_eq!(driver.run() & DRIVER_OK != 0, ok, "{features:#x}");
        assert_eq!(driver.running()[0], ok.then_some(features));
        driver.accept(offered ^ features);
        driver.enable(1, 0x4000);
        assert_eq!(driver.running()[1], ok.then_some(features), "they hold once they are agreed on");
    }
}

fn queues_start_with_the_driver_and_end_with_a_reset<D: Driver>(new: fn() -> D) {
    let mut driver = new();
    driver.negotiate(feature::VERSION_1);
    driver.enable(1, 0x4000);
    assert_eq!(driver.running(), [None, None]);
    driver.run();
    driver.run();
    assert_eq!(driver.running(), [None, Some(feature::VERSION_1)]);
    driver.enable(0, 0x8000);
    assert_eq!(driver.running(), [Some(feature::VERSION_1); 2], "late, but it does");
    assert_eq!(driver.get(Register::QueueReady), 1);

    assert_eq!(driver.set_status(0), 0);
    assert_eq!(driver.running(), [None, None]);
    driver.set(Register::QueueSelect, 0);
    assert_eq!((driver.get(Register::QueueReady), driver.get(Register::QueueSize)), (0, QUEUES[0].into()));
    driver.negotiate(feature::VERSION_1);
    driver.run();
    assert_eq!(driver.running(), [None, None], "nothing is left of the queues");
}

/// Every status a driver can write after every other: bits come as the rules have it, and go only all at once.
fn the_status_only_grows_until_it_is_reset<D: Driver>(new: fn() -> D) {
    for acceptable in [false, true] {
        for (first, second) in (1..=255u8).flat_map(|a| (0..=255u8).map(move |b| (a, b))) {
            let mut driver = new();
            driver.accept(if acceptable { feature::VERSION_1 } else { feature::VERSION_1 | 1 << 63 });
            let (old, new) = (driver.set_status(first), driver.set_status(second));
            let case = format!("{first:#x}, {second:#x}: {old:#x} -> {new:#x}");
            if second == 0 {
                assert_eq!(new, 0, "{case}");
                continue;
            }
            assert_eq!(old & !new, 0, "{case}: bits went");
            assert_eq!(new & !(old | second) | new & NEEDS_RESET, 0, "{case}: bits came by themselves");
            assert_eq!(new & FEATURES_OK != 0, acceptable && (old | second) & FEATURES_OK != 0, "{case}");
            assert!(new & DRIVER_OK == 0 || new & FEATURES_OK != 0, "{case}");
        }
    }
}

fn queues_that_are_not_there_take_nothing<D: Driver>(new: fn() -> D) {
    for missing in [2, 0xffff] {
        let mut driver = new();
        driver.set(Register::QueueSelect, missing);
        assert_eq!(driver.get(Register::QueueSize), 0);
        driver.set(Register::QueueSize, 8);
        driver.negotiate(feature::VERSION_1);
        driver.enable(missing, 0x1000);
        assert_eq!(driver.get(Register::QueueReady), 0);
        driver.run();
        assert_eq!(driver.running(), [None, None]);
    }
}

fn the_generation_follows_the_configuration<D: Driver>(new: fn() -> D) {
    let mut driver = new();
    driver.negotiate(feature::VERSION_1);
    driver.enable(0, 0x1000);
    driver.run();
    let before = driver.get(Register::Generation);
    driver.events().config_changed();
    assert_eq!(driver.get(Register::Generation), before + 1);
    driver.set(Register::Generation, 0);
    assert_eq!(driver.get(Register::Generation), before + 1, "it is read-only");
}

fn a_reset_does_not_wait_for_a_request_that_hangs<D: Driver>(new: fn() -> D) {
    let mut driver = new();
    driver.negotiate(feature::VERSION_1);
    driver.enable(0, 0x1000);
    let before = driver.run();
    driver.set_busy(true);
    for _ in 0..3 {
        assert_eq!(driver.set_status(0), before, "it is not reset yet");
        // A driver that does not wait changes nothing.
        driver.accept(0);
        driver.enable(1, 0x4000);
        assert_eq!(driver.set_status(!0), before);
        assert_eq!(driver.running(), [Some(feature::VERSION_1), None]);
    }
    driver.set_busy(false);
    assert_eq!(driver.status(), 0, "whoever looks sees it done");
    assert_eq!(driver.running(), [None, None]);
    driver.set(Register::QueueSelect, 0);
    assert_eq!((driver.get(Register::QueueReady), driver.get(Register::QueueSize)), (0, QUEUES[0].into()));

    // Not looked at in between: the next life finds it done, too.
    for wait in [true, false] {
        driver.negotiate(feature::VERSION_1);
        driver.enable(0, 0x1000);
        driver.run();
        driver.set_busy(wait);
        driver.set_status(0);
        driver.set_busy(false);
        driver.negotiate(feature::VERSION_1 | OWN_FEATURE);
        driver.enable(1, 0x4000);
        driver.run();
        assert_eq!(driver.running(), [None, Some(feature::VERSION_1 | OWN_FEATURE)]);
        driver.set_status(0);
    }
}
