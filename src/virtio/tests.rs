//! What a driver meets on either transport.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use super::core::status::{DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use super::feature;
use super::mmio::tests::MmioDriver;
use super::pci::tests::PciDriver;
use super::testing::{Driver, OWN_FEATURE, QUEUES, Register, Served};
use super::{QueueState, StillBusy};

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
    it_rests_and_goes_on_where_it_was
    a_request_that_hangs_keeps_it_from_rest
    a_reset_that_has_begun_comes_first
    a_device_that_needs_a_reset_stays_silent
    all_registers_move_to_another_device
    whatever_a_driver_does_can_be_saved
    mutated_states_are_refused_or_harmless
    each_rule_of_a_state_has_its_error
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

const HERE: QueueState = QueueState { next_avail: 0xfffe, next_used: 3 };

/// A driver of a device whose first queue runs.
fn one_queue<D: Driver>(new: fn() -> D) -> D {
    let mut driver = new();
    driver.negotiate(feature::VERSION_1);
    driver.unmask(2);
    driver.enable(0, 0x1000);
    driver.run();
    driver.served().stops_at = HERE;
    driver
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(1)
}

fn it_rests_and_goes_on_where_it_was<D: Driver>(new: fn() -> D) {
    let mut driver = one_queue(new);
    for _ in 0..3 {
        driver.suspend(soon()).unwrap();
        assert_eq!(driver.suspend(soon()), Ok(()), "it rests already");
        assert_eq!(driver.running(), [None, None]);
        let saved = driver.save();
        assert_eq!(driver.save(), saved);
        driver.resume();
        driver.resume();
        assert_eq!(driver.running(), [Some(feature::VERSION_1), None]);
        assert_eq!(driver.served().began_at, [Some(HERE), None]);
        assert_eq!(driver.heard(0), 0, "nothing has been missed");
    }
    // A driver that has not come so far has nothing that could rest.
    let mut driver = new();
    driver.suspend(soon()).unwrap();
    driver.resume();
    driver.negotiate(feature::VERSION_1);
    driver.enable(0, 0x1000);
    driver.suspend(soon()).unwrap();
    driver.resume();
    assert_eq!(driver.running(), [None, None]);
}

fn a_request_that_hangs_keeps_it_from_rest<D: Driver>(new: fn() -> D) {
    let mut driver = one_queue(new);
    driver.set_busy(true);
    for _ in 0..3 {
        assert_eq!(driver.suspend(soon()), Err(StillBusy));
        assert_eq!(driver.suspend(Instant::now()), Err(StillBusy));
        assert!(driver.served().asked[0]);
        driver.resume();
        assert_eq!(driver.served().asked, [false; 2]);
        assert_eq!(driver.running()[0], Some(feature::VERSION_1));
    }
    assert_eq!(driver.suspend(soon()), Err(StillBusy));
    driver.set_busy(false);
    driver.suspend(soon()).unwrap();
    assert_eq!(driver.running(), [None, None]);
    driver.resume();
    assert_eq!(driver.served().began_at[0], Some(HERE));
}

fn a_reset_that_has_begun_comes_first<D: Driver>(new: fn() -> D) {
    let mut driver = one_queue(new);
    driver.set_busy(true);
    let before = driver.set_status(0);
    assert_eq!(driver.suspend(soon()), Err(StillBusy));
    driver.resume();
    assert_eq!(driver.status(), before, "it has still begun");
    driver.set_busy(false);
    driver.suspend(soon()).unwrap();
    assert_eq!(driver.save()["core"]["status"], 0);
    driver.resume();
    assert_eq!((driver.status(), driver.running()), (0, [None, None]));
}

fn a_device_that_needs_a_reset_stays_silent<D: Driver>(new: fn() -> D) {
    let mut driver = one_queue(new);
    driver.events().needs_reset(&"a test");
    driver.suspend(soon()).unwrap();
    let saved = driver.save();
    driver.resume();
    assert_eq!(driver.running(), [None, None]);
    let mut other = D::of_fake(Arc::default());
    other.check(&saved).unwrap();
    other.restore(&saved);
    other.resume();
    assert_eq!((other.status() & NEEDS_RESET, other.running()), (NEEDS_RESET, [None, None]));
    for mut driver in [driver, other] {
        driver.set_status(0);
        driver.negotiate(feature::VERSION_1);
        driver.enable(0, 0x1000);
        driver.run();
        assert_eq!(driver.running()[0], Some(feature::VERSION_1));
        assert_eq!(driver.served().began_at[0], None);
    }
}

fn all_registers_move_to_another_device<D: Driver>(new: fn() -> D) {
    let mut driver = one_queue(new);
    let events = driver.events();
    driver.set(Register::DeviceFeatureSelect, 7);
    driver.set(Register::DriverFeatureSelect, 1);
    driver.set(Register::QueueSelect, 1);
    driver.set(Register::QueueSize, 8);
    driver.set(Register::QueueAddress(2), 0x1234_5678_9abc);
    events.config_changed();
    driver.served().told = 77;
    driver.suspend(soon()).unwrap();
    let saved = driver.save();
    drop(driver);

    let served = Arc::new(Mutex::new(Served { told: 77, ..Served::default() }));
    let mut other = D::of_fake(served);
    other.check(&saved).unwrap();
    assert_eq!(other.running(), [None, None]);
    other.restore(&saved);
    assert_eq!(other.save(), saved);
    assert_eq!(other.running(), [None, None], "not before it is resumed");
    other.resume();
    assert_eq!(other.running(), [Some(feature::VERSION_1), None]);
    assert_eq!(other.served().began_at, [Some(HERE), None]);
    assert!(other.heard(0) > 0, "what may have been missed is told once more");
    assert_eq!(other.get(Register::Generation), 1, "the configuration is the same");
    other.suspend(soon()).unwrap();
    other.resume();
    assert_eq!(other.heard(0), 0, "once");
    // The second queue can be taken up where the driver left it.
    other.set(Register::QueueAddress(2), 0x9000);
    other.enable(1, 0x8000);
    assert_eq!(other.running(), [Some(feature::VERSION_1); 2]);

    // A device that reads otherwise than before says so.
    let mut third = D::of_fake(Arc::default());
    third.restore(&saved);
    third.resume();
    assert_eq!(third.get(Register::Generation), 2);
}

/// What a driver may do: a register and a value.
fn actions() -> impl Strategy<Value = Vec<(u8, u8, u64)>> {
    let value = prop_oneof![0u64..16, any::<u64>(), (0u64..32).prop_map(|page| page << 12)];
    prop::collection::vec((0u8..14, any::<u8>(), value), 0..40)
}

fn act<D: Driver>(driver: &mut D, (action, how, value): (u8, u8, u64)) {
    match action {
        0 => driver.set(Register::DeviceFeatureSelect, value),
        1 => driver.set(Register::DriverFeatureSelect, value),
        2 => driver.set(Register::DriverFeatures, value),
        3 => drop(driver.set_status(value as u8)),
        4 => driver.set(Register::QueueSelect, value),
        5 => driver.set(Register::QueueSize, value),
        6 => driver.set(Register::QueueReady, value & 1),
        7 => driver.set(Register::QueueAddress(how % 3), value),
        8 => driver.negotiate(feature::VERSION_1 | value),
        9 => driver.enable(u64::from(how % 2), value),
        10 => drop(driver.run()),
        11 => driver.unmask(u16::from(how % 3)),
        12 => driver.notify(u16::from(how % 4)),
        _ => {
            let events = driver.served().events.clone();
            if let Some(events) = events {
                match how % 8 {
                    0 => events.needs_reset(&"a test"),
                    1..4 => events.config_changed(),
                    _ => events.queue_interrupt(u16::from(how % 2)),
                }
            }
        }
    }
}

fn whatever_a_driver_does_can_be_saved<D: Driver>(_new: fn() -> D) {
    let mut runner = TestRunner::default();
    let result = runner.run(&(actions(), actions()), |(before, after)| {
        let mut driver = D::of_fake(Arc::default());
        before.into_iter().for_each(|action| act(&mut driver, action));
        driver.suspend(soon()).unwrap();
        let saved = driver.save();
        let mut other = D::of_fake(Arc::default());
        prop_assert_eq!(other.check(&saved), Ok(()));
        other.restore(&saved);
        prop_assert_eq!(other.save(), saved);
        driver.resume();
        other.resume();
        prop_assert_eq!(driver.running(), other.running());
        // Both live on.
        for mut driver in [driver, other] {
            after.iter().for_each(|action| act(&mut driver, *action));
            driver.suspend(soon()).unwrap();
            driver.resume();
        }
        Ok(())
    });
    result.unwrap();
}

/// Changes something somewhere in a value.
pub(crate) fn mutate(value: &mut Value, choices: &mut impl Iterator<Item = u64>) {
    let Some(choice) = choices.next() else { return };
    match value {
        Value::Object(fields) if choice % 16 != 0 => {
            let at = choice as usize / 16 % fields.len().max(1);
            if let Some(field) = fields.values_mut().nth(at) {
                mutate(field, choices);
            }
        }
        Value::Array(items) if choice % 8 > 1 && !items.is_empty() => {
            let at = choice as usize / 8 % items.len();
            mutate(&mut items[at], choices);
        }
        Value::Array(items) if choice % 8 == 0 => drop(items.pop()),
        Value::Array(items) => items.extend(items.first().cloned()),
        Value::Object(fields) => drop(fields.insert("more".into(), Value::Null)),
        Value::Number(number) => {
            let old = number.as_u64().unwrap_or(0);
            let new = choices.next().unwrap_or(0);
            let new = match choice % 8 {
                0 => new,
                1 => new & 0xff,
                2 => old ^ 1 << (new % 64),
                3 => 0xffff,
                4 => u64::MAX,
                5 => old.wrapping_add(1),
                6 => old.wrapping_sub(1),
                _ => new & 0xffff_ffff,
            };
            *value = new.into();
        }
        Value::Bool(bit) => *bit = !*bit,
        other => {
            let instead = [Value::Null, json!("x"), json!(0), json!({"next_avail": 1, "next_used": 2})];
            *other = instead[choice as usize % 4].clone();
        }
    }
}

fn mutated_states_are_refused_or_harmless<D: Driver>(_new: fn() -> D) {
    let mut runner = TestRunner::default();
    let mutations = prop::collection::vec(prop::collection::vec(any::<u64>(), 1..8), 1..4);
    let result = runner.run(&(actions(), mutations, actions()), |(before, mutations, after)| {
        let mut driver = D::of_fake(Arc::default());
        before.into_iter().for_each(|action| act(&mut driver, action));
        driver.suspend(soon()).unwrap();
        let mut saved = driver.save();
        for choices in mutations {
            mutate(&mut saved, &mut choices.into_iter());
        }
        let mut other = D::of_fake(Arc::default());
        match other.check(&saved) {
            Err(error) => prop_assert!(!error.field.is_empty() && !error.problem.is_empty()),
            Ok(()) => {
                other.restore(&saved);
                // What is pending at a vector that nothing masks is sent.
                prop_assert_eq!(&other.save()["core"], &saved["core"]);
                other.resume();
                after.into_iter().for_each(|action| act(&mut other, action));
            }
        }
        Ok(())
    });
    result.unwrap();
}

fn each_rule_of_a_state_has_its_error<D: Driver>(new: fn() -> D) {
    let mut driver = one_queue(new);
    driver.suspend(soon()).unwrap();
    let good = driver.save();
    let other = D::of_fake(Arc::default());
    assert_eq!(other.check(&good), Ok(()));
    for (pointer, value, expected) in [
        ("/core/status", json!(0x8f), None),
        ("/core/status", json!(0x1f), Some("core.status: 0x1f has bits that do not exist")),
        ("/core/status", json!(7), Some("core.status: 0x7 has DRIVER_OK without FEATURES_OK")),
        ("/core/status", json!(11), Some("core.queues[0].progress: the queue has not been started")),
        (
            "/core/driver_features",
            json!(1u64 << 32 | 1 << 40),
            Some("core.driver_features: the device does not offer 0x10000000000 of 0x10100000000"),
        ),
        ("/core/driver_features", json!(OWN_FEATURE), Some("core.driver_features: 0x20 lacks VERSION_1")),
        ("/core/isr", json!(4), Some("core.isr: 0x4 has bits that do not exist")),
        ("/core/queues", json!([]), Some("core.queues: there are 0, and the device has 2")),
        ("/core/queues/0/progress", Value::Null, Some("core.queues[0].progress: it is missing")),
        ("/core/queues/0/enabled", json!(false), Some("core.queues[0].progress: the queue has not been started")),
        ("/core/queues/1/enabled", json!(true), Some("core.queues[1].progress: it is missing")),
        (
            "/core/queues/0/layout/size",
            json!(128),
            Some("core.queues[0].layout: queue of 128 entries: the size is not a power of two up to the maximum"),
        ),
        (
            "/core/queues/0/layout/used",
            json!(u64::MAX - 3),
            Some("core.queues[0].layout: the rings are misaligned or not in guest memory"),
        ),
        ("/core/queues/1/layout/size", json!(0xffff), None),
        ("/core/own/kind", json!("net"), Some("core.own.kind: it is that of a net device, not of a rng")),
        ("/core/own/version", json!(2), Some("core.own.version: 2 is not known, only 1")),
        ("/core/own/state", json!([]), Some("core.own.state: invalid type: sequence, expected u32")),
    ] {
        let mut state = good.clone();
        *state.pointer_mut(pointer).unwrap() = value;
        let found = other.check(&state).err().map(|error| error.to_string());
        assert_eq!(found.as_deref(), expected, "{pointer}");
    }
}
