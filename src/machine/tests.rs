//! Machines on this host's KVM, with guests of a few instructions. Where there is no KVM these tests say so, and pass.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::backend::OpenDirectly;
use crate::boot::BootFile;
use crate::config::{MemorySize, Transport};
use crate::observe::Timeline;
use crate::platform::serial::SerialOutput;

/// Generous: a guest takes milliseconds, a busy machine seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// Where guests count.
const COUNTER: GuestAddress = GuestAddress(0x20_0000);

/// Guests in 32-bit protected mode, without paging. Labels begin their line; what jumps there ends the last one.
mod guests {
    /// `1: incl COUNTER; jmp 1b`
    pub const COUNTING: &[u8] = &[0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xf8];
    /// `1: incl COUNTER; out %al, $0x80; jmp 1b`
    pub const COUNTING_EXITS: &[u8] = &[0xff, 0x05, 0, 0, 0x20, 0, 0xe6, 0x80, 0xeb, 0xf6];
    /// `mov $0x3f8, %dx; mov $'x', %al`; `1: out %al, %dx; incl COUNTER; jmp 1b`
    pub const TALKING: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xf7];
    /// `mov $0x600, %dx; mov $0x34, %al; out %al, %dx`; `1: hlt; jmp 1b`
    pub const POWERING_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];
}

/// A guest with as many vCPUs, of which it uses one.
fn parts(guest: &[u8], cpus: u8) -> Parts {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&crate::boot::tests::elf(guest, Some(0x100_0000))).unwrap();
    Parts {
        kernel: BootFile { file, path: "guest".into() },
        initrd: None,
        cmdline: String::new(),
        cpus,
        memory: MemorySize(64 << 20),
        disks: Vec::new(),
        nics: Vec::new(),
        entropy: None,
        serial: SerialSetup(SerialOutput::Null),
        transport: Transport::Pci,
        vcpu_thread: "vcpu",
    }
}

fn build(parts: Parts) -> Option<Machine> {
    if !std::fs::exists("/dev/kvm").unwrap() {
        println!("not tested: this host has no KVM");
        return None;
    }
    let timeline = Arc::new(Timeline::from(Instant::now()));
    Some(Machine::build(parts, &OpenDirectly, &timeline).unwrap())
}

fn count(machine: &Machine) -> u32 {
    machine._ram.load(COUNTER, Ordering::Relaxed).unwrap()
}

#[track_caller]
fn wait_until(mut what: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[track_caller]
fn wait_until_it_counts(machine: &Machine) {
    let before = count(machine);
    wait_until(|| count(machine) != before);
}

#[test]
fn a_guest_stands_still_while_it_is_paused() {
    for (guest, cpus) in [(guests::COUNTING, 1), (guests::COUNTING_EXITS, 1), (guests::COUNTING, 3)] {
        let Some(mut machine) = build(parts(guest, cpus)) else { return };
        assert!(matches!(machine.pause(), Err(MachineError::NotNow { request: "pause", state: "built" })));
        machine.start().unwrap();
        for round in 0..50 {
            wait_until_it_counts(&machine);
            assert_eq!(machine.pause().unwrap(), Pause::Paused);
            let before = count(&machine);
            std::thread::sleep(Duration::from_millis(if round % 10 == 0 { 20 } else { 1 }));
            assert_eq!(count(&machine), before, "round {round}");
            assert_eq!(machine.pause().unwrap(), Pause::Paused, "it is already");
            assert!(matches!(machine.state(), State::Paused { stopping: false }));
            machine.resume().unwrap();
            machine.resume().unwrap();
            assert!(matches!(machine.state(), State::Running));
        }
        machine.pause().unwrap();
        machine.kill();
        assert!(matches!(machine.state(), State::Ended(End::Killed)));
        assert!(matches!(machine.resume(), Err(MachineError::NotNow { state: "ended", .. })));
    }
}

#[test]
fn pauses_in_quick_succession_lose_no_vcpu() {
    let Some(mut machine) = build(parts(guests::COUNTING_EXITS, 2)) else { return };
    machine.start().unwrap();
    for _ in 0..500 {
        assert_eq!(machine.pause().unwrap(), Pause::Paused);
        machine.resume().unwrap();
    }
    wait_until_it_counts(&machine);
    assert!(machine.handle_events().is_empty(), "no pause was left over");
}

#[test]
fn a_vcpu_that_hangs_on_the_console_keeps_nobody_waiting() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let serial = SerialSetup(SerialOutput::File(std::os::fd::OwnedFd::from(writer).into()));
    let Some(mut machine) = build(Parts { serial, ..parts(guests::TALKING, 1) }) else { return };
    machine.start().unwrap();
    let hang = |machine: &mut Machine| {
        wait_until(|| {
            let hangs = machine.pause().unwrap() == Pause::Pausing;
            if !hangs {
                machine.resume().unwrap();
            }
            hangs
        });
    };
    hang(&mut machine);
    assert!(matches!(machine.state(), State::Pausing { stopping: false }));
    assert!(machine.handle_events().is_empty());

    // Somebody reads: then it is paused, and the owner hears of it.
    reader.read_exact(&mut [0; 0x4000]).unwrap();
    let mut notices = Vec::new();
    wait_until(|| {
        notices = machine.handle_events();
        !notices.is_empty()
    });
    assert_eq!(notices, [Notice::Paused]);
    assert!(matches!(machine.state(), State::Paused { .. }));
    let before = count(&machine);
    machine.resume().unwrap();
    wait_until(|| count(&machine) != before);

    // A pause is taken back; one that hangs is ended.
    hang(&mut machine);
    machine.resume().unwrap();
    hang(&mut machine);
    machine.kill();
    assert!(matches!(machine.state(), State::Ended(End::Killed)));
    drop(reader);
}

#[test]
fn a_button_pressed_in_a_pause_is_found_afterwards() {
    let Some(mut machine) = build(parts(guests::COUNTING, 1)) else { return };
    machine.start().unwrap();
    machine.pause().unwrap();
    machine.press_power_button();
    assert!(matches!(machine.state(), State::Paused { stopping: true }));
    let unread = machine.event_device.lock().unwrap().save();
    assert_eq!(unread.events, crate::platform::events::POWER_BUTTON);
    machine.resume().unwrap();
    assert!(matches!(machine.state(), State::Stopping));
}

#[test]
fn a_guest_that_ends_while_it_is_paused_has_ended() {
    for _ in 0..20 {
        let Some(mut machine) = build(parts(guests::POWERING_OFF, 1)) else { return };
        machine.start().unwrap();
        wait_until(|| {
            // It may end at any point of this.
            if machine.pause().is_ok() {
                machine.handle_events();
                let _ = machine.resume();
            }
            machine.handle_events();
            matches!(machine.state(), State::Ended(_))
        });
        assert!(matches!(machine.state(), State::Ended(End::PowerOff)));
    }
}
