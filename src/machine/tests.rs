//! Machines on this host's KVM, with guests of a few instructions. Where there is no KVM these tests say so, and pass.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::backend::disk::tests::patiently;
use crate::backend::{DiskError, OpenDirectly};
use crate::boot::BootFile;
use crate::config::{MemorySize, RateLimits, Transport};
use crate::observe::Timeline;
use crate::platform::chips::Clock;
use crate::platform::layout;
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
    /// `1: mov (removals asked for), %eax; test %eax, %eax; jz 1b; mov %eax, (ejected); jmp 1b`
    pub const EJECTING: &[u8] =
        &[0xa1, 0x08, 0x10, 0, 0xc0, 0x85, 0xc0, 0x74, 0xf7, 0xa3, 0x0c, 0x10, 0, 0xc0, 0xeb, 0xf0];
    /// `1: movl $-1, (ejected); incl COUNTER; jmp 1b`
    pub const EJECTING_ALL: &[u8] =
        &[0xc7, 0x05, 0x0c, 0x10, 0, 0xc0, 255, 255, 255, 255, 0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xee];
    /// `mov $0x600, %dx; mov $0x34, %al; out %al, %dx`; `1: hlt; jmp 1b`
    pub const POWERING_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];
}

/// A guest with as many vCPUs, of which it uses one.
fn parts(guest: &[u8], cpus: u8) -> Parts {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&crate::boot::tests::elf(guest, Some(0x100_0000))).unwrap();
    Parts {
        origin: Origin::Kernel {
            kernel: BootFile { file, path: "guest".into() },
            initrd: None,
            cmdline: String::new(),
        },
        cpus,
        threads_per_core: 1,
        cpu_changes: Default::default(),
        memory: MemorySize(64 << 20),
        memory_pages: Default::default(),
        track_writes: false,
        disks: Vec::new(),
        nics: Vec::new(),
        budgets: Default::default(),
        entropy: None,
        serial: SerialSetup(SerialOutput::Null),
        transport: Transport::Pci,
        memory_policy: crate::config::MemoryPolicy::default(),
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
    machine.ram.load(COUNTER, Ordering::Relaxed).unwrap()
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

fn disk_file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn open_disk(id: &str, file: &tempfile::NamedTempFile) -> OpenDisk {
    patiently(|| try_open_disk(id, file))
}

fn try_open_disk(id: &str, file: &tempfile::NamedTempFile) -> Result<OpenDisk, MachineError> {
    OpenDisk::open(id, &file.path().to_str().unwrap().parse().unwrap(), &OpenDirectly)
}

fn is_locked(file: &tempfile::NamedTempFile) -> bool {
    matches!(try_open_disk("x", file), Err(MachineError::Disk(DiskError::Locked { .. })))
}

fn disk(id: &str) -> DeviceId {
    DeviceId::Disk(id.into())
}

/// Vendor and device in PCI slots that are not empty.
fn in_slots(machine: &Machine) -> Vec<(u64, u32)> {
    let vendor = |slot: u64| {
        let mut data = [0; 4];
        machine.board.mmio.read(layout::ECAM + (slot << 15), &mut data);
        u32::from_le_bytes(data)
    };
    (1..32).map(|slot| (slot, vendor(slot))).filter(|&(_, vendor)| vendor != u32::MAX).collect()
}

const BLOCK: u32 = 0x1042_1af4;

#[track_caller]
fn wait_for_notice(machine: &mut Machine) -> Notice {
    let mut notices = Vec::new();
    wait_until(|| {
        notices.extend(machine.handle_events());
        !notices.is_empty()
    });
    assert_eq!(notices.len(), 1);
    notices.remove(0)
}

#[test]
fn a_disk_comes_and_goes_as_the_guest_lets_it() {
    let Some(mut machine) = build(parts(guests::EJECTING, 1)) else { return };
    let file = disk_file();
    let early = machine.plug_disk(open_disk("data", &file));
    assert!(matches!(early, Err(MachineError::NotNow { state: "built", .. })));
    machine.start().unwrap();
    for round in 1..=40u64 {
        machine.plug_disk(open_disk("data", &file)).unwrap();
        // A new slot each time.
        let slot = (round - 1) % 31 + 1;
        assert_eq!(in_slots(&machine), [(slot, BLOCK)]);
        assert_eq!(machine.devices().collect::<Vec<_>>(), [(&disk("data"), Presence::Present)]);
        machine.limit_disk("data", &RateLimits::default()).unwrap();
        if round % 2 == 0 {
            // What is asked for in a pause is done after it.
            machine.pause().unwrap();
        }
        machine.unplug(&disk("data")).unwrap();
        machine.unplug(&disk("data")).unwrap();
        if round % 2 == 0 {
            assert!(machine.handle_events().is_empty());
            assert_eq!(machine.devices().next().unwrap().1, Presence::Leaving);
            machine.resume().unwrap();
        }
        assert_eq!(wait_for_notice(&mut machine), Notice::Unplugged(disk("data")));
        assert_eq!((machine.devices().count(), in_slots(&machine)), (0, vec![]));
        machine.limit_disk("data", &RateLimits::default()).unwrap_err();
    }
    machine.kill();
    let late = machine.plug_disk(open_disk("data", &file));
    assert!(matches!(late, Err(MachineError::NotNow { state: "ended", .. })));
}

#[test]
fn a_guest_that_lets_nothing_go_keeps_it_and_one_that_lets_all_go_does_too() {
    let Some(mut machine) = build(parts(guests::COUNTING, 1)) else { return };
    machine.start().unwrap();
    machine.plug_disk(open_disk("data", &disk_file())).unwrap();
    machine.unplug(&disk("data")).unwrap();
    assert!(machine.handle_events().is_empty());
    assert_eq!(machine.devices().collect::<Vec<_>>(), [(&disk("data"), Presence::Leaving)]);
    let again = machine.plug_disk(open_disk("data", &disk_file()));
    assert!(matches!(again, Err(MachineError::Plug(PlugError::Leaving(id))) if id == disk("data")));

    let Some(mut machine) = build(parts(guests::EJECTING_ALL, 1)) else { return };
    machine.start().unwrap();
    machine.plug_disk(open_disk("data", &disk_file())).unwrap();
    for _ in 0..10 {
        wait_until_it_counts(&machine);
        assert!(machine.handle_events().is_empty());
    }
    assert_eq!(machine.devices().collect::<Vec<_>>(), [(&disk("data"), Presence::Present)]);
    assert_eq!(in_slots(&machine), [(1, BLOCK)]);
    machine.unplug(&disk("data")).unwrap();
    assert_eq!(wait_for_notice(&mut machine), Notice::Unplugged(disk("data")));
}

#[test]
fn what_cannot_be_plugged_in_changes_nothing() {
    let file = disk_file();
    let disks = vec![open_disk("root", &file)];
    let Some(mut machine) = build(Parts { disks, ..parts(guests::EJECTING, 1) }) else { return };
    machine.start().unwrap();
    let refused = |result: Result<(), MachineError>, expected: PlugError| {
        let MachineError::Plug(error) = result.unwrap_err() else { panic!("not {expected}") };
        assert_eq!(error, expected);
    };
    let other = disk_file();
    refused(machine.plug_disk(open_disk("root", &other)), PlugError::IdInUse(disk("root")));
    refused(machine.unplug(&disk("data")), PlugError::Unknown(disk("data")));
    refused(machine.unplug(&DeviceId::Nic("root".into())), PlugError::Unknown(DeviceId::Nic("root".into())));
    assert!(is_locked(&file));
    for n in 2..=31 {
        machine.plug_disk(open_disk(&format!("disk{n}"), &disk_file())).unwrap();
    }
    refused(machine.plug_disk(open_disk("one-more", &other)), PlugError::NoSlot);
    assert_eq!((machine.devices().count(), in_slots(&machine).len()), (31, 31));
    open_disk("one-more", &other);
    // One that was there at first goes as well.
    machine.unplug(&disk("root")).unwrap();
    assert_eq!(wait_for_notice(&mut machine), Notice::Unplugged(disk("root")));
    machine.plug_disk(open_disk("root", &file)).unwrap();
    assert_eq!(in_slots(&machine).len(), 31);

    for (pci, expected) in [(false, Some(PlugError::NoPci)), (true, None)] {
        let disks = vec![open_disk("root", &other)];
        let transport = Transport::Mmio { pci };
        let mut machine = build(Parts { disks, transport, ..parts(guests::EJECTING, 1) }).unwrap();
        machine.start().unwrap();
        let plugged = machine.plug_disk(open_disk("data", &disk_file()));
        match expected {
            Some(expected) => refused(plugged, expected),
            None => plugged.unwrap(),
        }
        refused(machine.unplug(&disk("root")), PlugError::NoPci);
    }
}

#[test]
fn two_devices_of_one_name_are_not_built() {
    let disks = [(); 2].map(|()| open_disk("twin", &disk_file())).into();
    let timeline = Arc::new(Timeline::from(Instant::now()));
    if build(parts(guests::COUNTING, 1)).is_some() {
        let built = Machine::build(Parts { disks, ..parts(guests::COUNTING, 1) }, &OpenDirectly, &timeline);
        assert!(matches!(built, Err(MachineError::Plug(PlugError::IdInUse(_)))));
    }
}

#[test]
fn a_disk_gets_another_file_or_its_own_again() {
    for transport in [Transport::Pci, Transport::Mmio { pci: false }] {
        let files = [disk_file(), disk_file()];
        let disks = vec![open_disk("data", &files[0])];
        let Some(mut machine) = build(Parts { disks, transport, ..parts(guests::COUNTING, 1) }) else { return };
        let replace = |machine: &mut Machine, id: &str, path: &std::path::Path| {
            machine.replace_disk(id, path, &crate::config::Image::default(), &OpenDirectly)
        };
        let early = replace(&mut machine, "data", files[1].path());
        assert!(matches!(early, Err(MachineError::NotNow { .. })));
        machine.start().unwrap();
        for round in 1..10 {
            let (new, old) = (&files[round % 2], &files[1 - round % 2]);
            assert_eq!(patiently(|| replace(&mut machine, "data", new.path())), Replacement::Done);
            assert!(is_locked(new));
            open_disk("x", old);
            new.as_file().set_len(4096 << round).unwrap();
            assert_eq!(patiently(|| replace(&mut machine, "data", new.path())), Replacement::Done);
            let (drive, _) = machine.devices.drive("data").unwrap();
            assert_eq!(drive.disk.bytes(), 4096 << round);
            assert!(is_locked(new), "it still is");
        }
        // What cannot be used changes nothing.
        for bad in ["/nowhere", "/dev", "/dev/null"] {
            assert!(matches!(replace(&mut machine, "data", bad.as_ref()), Err(MachineError::Disk(_))), "{bad}");
        }
        files[1].as_file().set_len(0).unwrap();
        for file in &files {
            file.as_file().set_len(0).unwrap();
            let empty = replace(&mut machine, "data", file.path());
            assert!(matches!(empty, Err(MachineError::Disk(DiskError::Empty { .. }))));
        }
        let unknown = replace(&mut machine, "root", files[0].path());
        assert!(matches!(unknown, Err(MachineError::Plug(PlugError::Unknown(id))) if id == disk("root")));
        assert!(machine.handle_events().is_empty(), "all is told");
        if transport == Transport::Pci {
            machine.unplug(&disk("data")).unwrap();
            let leaving = replace(&mut machine, "data", files[0].path());
            assert!(matches!(leaving, Err(MachineError::Plug(PlugError::Leaving(_)))));
        }
    }
}

/// Saves a paused machine.
fn save(machine: &mut Machine) -> (crate::config::SavedVm, MachineStateV1, std::fs::File) {
    let file = tempfile::tempfile().unwrap();
    let saved = machine.at_rest(|rest| {
        rest.write_memory(&file)?;
        Ok::<_, SaveError>((rest.config(&OpenDirectly), rest.state()?))
    });
    let (config, state) = saved.unwrap();
    (config, state, file)
}

fn restore(
    config: &crate::config::SavedVm,
    state: MachineStateV1,
    memory: &std::fs::File,
) -> Result<Machine, MachineError> {
    let origin = Origin::Saved {
        state: Box::new(state),
        memory: SavedMemory::File(memory.try_clone().unwrap()),
        clock: Clock::Continue,
    };
    let parts = Parts::of_saved(config, origin, SerialSetup(SerialOutput::Null), "vcpu", &OpenDirectly)?;
    Machine::build(parts, &OpenDirectly, &Arc::new(Timeline::from(Instant::now())))
}

#[test]
fn a_guest_goes_on_where_it_was_saved_and_more_than_once() {
    for (guest, cpus) in [(guests::COUNTING, 1), (guests::COUNTING_EXITS, 1), (guests::COUNTING_EXITS, 3)] {
        let Some(mut machine) = build(parts(guest, cpus)) else { return };
        machine.start().unwrap();
        wait_until_it_counts(&machine);
        assert!(matches!(machine.at_rest(|_| Ok::<_, SaveError>(())), Err(SaveError::NotPaused("running"))));
        machine.pause().unwrap();
        let (config, state, memory) = save(&mut machine);
        let saved = count(&machine);
        // It has gone through a file meanwhile.
        let text = serde_json::to_string(&state).unwrap();
        let state: MachineStateV1 = serde_json::from_str(&text).unwrap();
        machine.resume().unwrap();
        wait_until_it_counts(&machine);
        drop(machine);

        for _ in 0..2 {
            let mut machine = restore(&config, state.clone(), &memory).unwrap();
            assert!(matches!(machine.state(), State::Paused { stopping: false }));
            assert_eq!(count(&machine), saved);
            // What has not run yet is what it was.
            let (again, _, _) = save(&mut machine);
            assert_eq!(again, config);
            machine.resume().unwrap();
            wait_until_it_counts(&machine);
            machine.pause().unwrap();
            let (config, state, memory) = save(&mut machine);
            let later = count(&machine);
            assert!(later > saved);
            let machine = restore(&config, state, &memory).unwrap();
            assert_eq!(count(&machine), later, "of a machine that was restored");
        }
    }
}

#[test]
fn a_saved_state_that_does_not_fit_is_refused() {
    let Some(mut machine) = build(parts(guests::COUNTING, 2)) else { return };
    machine.start().unwrap();
    machine.pause().unwrap();
    let (config, state, memory) = save(&mut machine);
    let refused = |config: &crate::config::SavedVm, state: &MachineStateV1| {
        let error = restore(config, state.clone(), &memory).err().expect("it is refused");
        let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    };
    let mut more = config.clone();
    more.cpus = 3;
    assert!(refused(&more, &state).contains("it has 2 vCPUs, not 3"));
    more = config.clone();
    more.memory = MemorySize(32 << 20);
    assert!(refused(&more, &state).contains("67108864 bytes where the VM has 33554432"));
    more = config.clone();
    more.transport = Transport::Mmio { pci: false };
    assert!(refused(&more, &state).contains("the saved devices have a PCI bus, and the VM has no PCI bus"));
    more = config.clone();
    more.entropy = Some(Default::default());
    assert!(refused(&more, &state).contains("no saved state of it"));
    let mut other = state.clone();
    other.pci_window_64 = Some((1 << 51, 1 << 52));
    assert!(refused(&config, &other).contains("PCI window"));
    other = state.clone();
    other.vcpus[0].0.cpuid.iter_mut().filter(|entry| entry.0.function == 0).for_each(|entry| entry.0.ebx ^= 1);
    assert!(refused(&config, &other).contains("it ran on a CPU of"));
    other = state.clone();
    other.vcpus[1].0.msrs.push((0xdead_beef, 1));
    assert!(refused(&config, &other).contains("refuses MSR 0xdeadbeef with value 0x1"));
    other = state.clone();
    other.serial.0.input = vec![0; 1000];
    assert!(refused(&config, &other).contains("more input than a port holds"));
    other = state.clone();
    other.vcpus[0].0.xsave.0 = vec![0xff; 1 << 20];
    assert!(refused(&config, &other).contains("bytes of FPU state"));
}

/// What is saved of a machine, for tests of what becomes of it.
pub fn saved_for_tests() -> Option<(crate::config::SavedVm, MachineStateV1)> {
    static SAVED: std::sync::OnceLock<Option<(crate::config::SavedVm, MachineStateV1)>> = std::sync::OnceLock::new();
    SAVED
        .get_or_init(|| {
            let mut machine = build(parts(guests::COUNTING, 1))?;
            machine.start().unwrap();
            machine.pause().unwrap();
            let (config, state, _) = save(&mut machine);
            Some((config, state))
        })
        .clone()
}
