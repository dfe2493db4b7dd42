//! Devices on the buses of a VM that has no vCPU. Where there is no KVM these tests say so, and pass.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::super::builder::create_vm;
use super::state::PlaceStateV1;
use super::*;
use crate::backend::OpenDirectly;
use crate::backend::disk::tests::patiently;
use crate::config::{MAX_DEVICES, RateLimits};
use crate::devices::rng::NoConfig;
use crate::devices::worker::{Engine, Served, Turn, Worker, serve_each};
use crate::machine::board::News;
use crate::memory::anonymous;
use crate::observe::Timeline;
use crate::platform::bus::Bus;
use crate::virtio::tests::mutate;
use crate::virtio::{Chain, DeviceKind, RingError, Virtqueue, feature};

const TRANSPORTS: [Transport; 3] = [Transport::Pci, Transport::Mmio { pci: false }, Transport::Mmio { pci: true }];
const WINDOW_64: Option<(u64, u64)> = Some((1 << 38, 1 << 39));

struct Pc {
    board: Board,
    interrupts: Arc<Interrupts>,
    ram: Ram,
}

impl Pc {
    fn new(ram: &Ram) -> Option<Self> {
        if !std::fs::exists("/dev/kvm").unwrap() {
            println!("not tested: this host has no KVM");
            return None;
        }
        let vm = create_vm(&kvm_ioctls::Kvm::new().unwrap()).unwrap();
        vm.create_irq_chip().unwrap();
        let events = Arc::new(EventQueue::new().unwrap());
        let news = Arc::new(News { events, timeline: Arc::new(Timeline::from(Instant::now())) });
        let board = Board { ports: Bus::default(), mmio: Arc::default(), news };
        Some(Self { board, interrupts: Arc::new(Interrupts::new(Arc::new(vm))), ram: ram.clone() })
    }

    fn attach(&self, opened: Opened, transport: Transport) -> Devices {
        Devices::attach(opened, transport, &self.ram, &self.board, &self.interrupts, WINDOW_64).unwrap()
    }

    fn restore(&self, opened: Opened, saved: &DevicesStateV1, transport: Transport) -> Result<Devices, MachineError> {
        Devices::restore(opened, saved, transport, &self.ram, &self.board, &self.interrupts, WINDOW_64)
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.board.mmio.write(address, bytes);
    }

    /// A driver's first steps, up to a queue at [`RING`] of 8 entries that runs.
    fn set_up(&self, device: &Device) {
        let features = feature::VERSION_1.to_le_bytes();
        let ring = [RING, RING + 0x1000, RING + 0x2000].map(u64::to_le_bytes);
        match &device.place.seat {
            Seat::Pci(slot) => {
                let (config, bar) = (layout::ECAM + ((*slot as u64) << 15), PciRoot::initial_bar(*slot));
                self.write(config + 4, &[6, 0]);
                self.write(bar + 0x14, &[3]);
                for (half, at) in [(0u32, 0), (1, 4)] {
                    self.write(bar + 8, &half.to_le_bytes());
                    self.write(bar + 12, &features[at..at + 4]);
                }
                self.write(bar + 0x14, &[11]);
                self.write(bar + 0x18, &8u16.to_le_bytes());
                for (part, address) in (0..).zip(ring) {
                    self.write(bar + 0x20 + 8 * part, &address);
                }
                self.write(bar + 0x1c, &1u16.to_le_bytes());
                self.write(bar + 0x14, &[15]);
            }
            Seat::Mmio(place, _) => {
                let set = |at: u64, value: &[u8]| self.write(place.address + at, value);
                set(0x70, &3u32.to_le_bytes());
                for (half, at) in [(0u32, 0), (1, 4)] {
                    set(0x24, &half.to_le_bytes());
                    set(0x20, &features[at..at + 4]);
                }
                set(0x70, &11u32.to_le_bytes());
                set(0x38, &8u32.to_le_bytes());
                for (part, address) in (0..).zip(ring) {
                    set(0x80 + 16 * part, &address[..4]);
                    set(0x84 + 16 * part, &address[4..]);
                }
                set(0x44, &1u32.to_le_bytes());
                set(0x70, &15u32.to_le_bytes());
            }
        }
    }

    /// Makes request `n`, for 16 bytes, without a kick.
    fn request(&self, n: u16) {
        let descriptor = u128::from(BUFFER) | 16 << 64 | 2 << 96;
        self.ram.write_obj(descriptor.to_le(), GuestAddress(RING)).unwrap();
        self.ram.write_obj(0u16, GuestAddress(RING + 0x1004 + 2 * u64::from(n % 8))).unwrap();
        self.ram.write_obj((n + 1).to_le(), GuestAddress(RING + 0x1002)).unwrap();
    }

    fn used(&self) -> u16 {
        self.ram.read_obj(GuestAddress(RING + 0x2002)).unwrap()
    }

    fn wait_used(&self, count: u16) {
        let begun = Instant::now();
        while self.used() != count {
            assert!(begun.elapsed() < Duration::from_secs(10), "{} of {count}", self.used());
            std::thread::yield_now();
        }
    }
}

const RING: u64 = 0x1_0000;
const BUFFER: u64 = 0x2_0000;

fn ram() -> Ram {
    anonymous(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn disk_file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn open_disk(id: &str, file: &NamedTempFile) -> OpenDisk {
    patiently(|| OpenDisk::open(id, &file.path().to_str().unwrap().parse().unwrap(), &OpenDirectly))
}

fn opened(disks: &[(&str, &NamedTempFile)]) -> Opened {
    Opened {
        disks: disks.iter().map(|(id, file)| open_disk(id, file)).collect(),
        nics: Vec::new(),
        entropy: Some(EntropyConfig { limits: RateLimits::default() }),
    }
}

fn through_a_file(saved: &DevicesStateV1) -> DevicesStateV1 {
    serde_json::from_str(&serde_json::to_string(saved).unwrap()).unwrap()
}

fn entropy(devices: &Devices) -> &Device {
    devices.all.iter().find(|device| device.id == DeviceId::Entropy).unwrap()
}

#[test]
fn all_devices_are_where_and_what_they_were() {
    for transport in TRANSPORTS {
        let (ram, files) = (ram(), [disk_file(), disk_file(), disk_file()]);
        let [a, b, c] = &files;
        let Some(pc) = Pc::new(&ram) else { return };
        let mut devices = pc.attach(opened(&[("a", a), ("b", b)]), transport);
        if devices.pci.is_some() {
            devices.plug_disk(open_disk("late", c)).unwrap();
            pc.board.ports.write(0xcf8, &0x8000_1234u32.to_le_bytes());
        }
        pc.set_up(entropy(&devices));
        pc.request(0);
        // It is looked at when the device goes on, as nobody has kicked.
        devices.suspend(soon()).unwrap();
        devices.resume();
        pc.wait_used(1);
        devices.suspend(soon()).unwrap();
        pc.request(1);
        let saved = devices.save();
        drop((devices, pc));

        let Some(pc) = Pc::new(&ram) else { return };
        let mut disks = vec![("a", a), ("b", b)];
        if saved.pci.is_some() {
            // In whatever order.
            disks.insert(0, ("late", c));
        }
        let mut devices = pc.restore(opened(&disks), &through_a_file(&saved), transport).unwrap();
        let mut again = devices.save();
        again.devices.sort_by_key(|device| saved.devices.iter().position(|other| other.id == device.id));
        assert_eq!(again, saved);
        assert_eq!(pc.used(), 1, "nothing is done before it goes on");
        devices.resume();
        pc.wait_used(2);
        if devices.pci.is_some() {
            let mut address = [0; 4];
            pc.board.ports.read(0xcf8, &mut address);
            assert_eq!(u32::from_le_bytes(address), 0x8000_1234);
            assert!(matches!(devices.expect_to_leave(&DeviceId::Disk("late".into())), Ok(Some(_))));
        }
    }
}

#[test]
fn a_device_that_is_to_leave_still_is() {
    let (ram, file) = (ram(), disk_file());
    let Some(pc) = Pc::new(&ram) else { return };
    let mut devices = pc.attach(opened(&[("a", &file)]), Transport::Pci);
    let id = DeviceId::Disk("a".into());
    let slot = devices.expect_to_leave(&id).unwrap().unwrap();
    devices.suspend(soon()).unwrap();
    let saved = devices.save();
    drop((devices, pc));

    let Some(pc) = Pc::new(&ram) else { return };
    let mut devices = pc.restore(opened(&[("a", &file)]), &saved, Transport::Pci).unwrap();
    devices.resume();
    assert_eq!(devices.iter().collect::<Vec<_>>(), [(&id, Presence::Leaving)]);
    assert!(devices.eject(slot, &pc.board.news.events));
    assert_eq!(
        devices.suspend(soon()).unwrap_err().to_string(),
        "disk 'a', which the guest has let go of, is still being taken apart"
    );
    devices.forget(slot).unwrap();
    devices.suspend(soon()).unwrap();
}

/// Each request waits for the gate; is there one?
struct Gate(Arc<Mutex<()>>, Arc<AtomicBool>);

impl Engine for Gate {
    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        serve_each(queue, chain, turn, |_, _| {
            self.1.store(true, Ordering::Release);
            drop(self.0.lock().unwrap());
            Ok(0)
        })
    }
}

#[test]
fn a_request_that_hangs_keeps_all_awake() {
    let ram = ram();
    let Some(pc) = Pc::new(&ram) else { return };
    let mut devices = pc.attach(opened(&[]), Transport::Pci);
    let (gate, waits) = (Arc::<Mutex<()>>::default(), Arc::<AtomicBool>::default());
    let worker = Worker::spawn("hanging", Box::new(Gate(gate.clone(), waits.clone())), &[(0, 64)]).unwrap();
    let front = Front::new(DeviceKind::Rng, "hanging".into(), feature::RING, NoConfig, vec![Box::new(worker)]);
    devices.put_behind_pci(Made { front, id: DeviceId::Disk("slow".into()), drive: None }).unwrap();
    let hung = gate.lock().unwrap();
    pc.request(0);
    pc.set_up(&devices.all[1]);
    let begun = Instant::now();
    while !waits.load(Ordering::Acquire) {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::yield_now();
    }
    for _ in 0..3 {
        let error = devices.suspend(Instant::now() + Duration::from_millis(5)).unwrap_err();
        assert_eq!(error.to_string(), "disk 'slow' is still busy with a request of the guest");
    }
    drop(hung);
    pc.wait_used(1);
    // All go on as if nobody had asked.
    pc.request(1);
    pc.write(PciRoot::initial_bar(2) + 0x3000, &[0, 0]);
    pc.wait_used(2);
    devices.suspend(soon()).unwrap();
}

#[test]
fn what_does_not_fit_is_named() {
    for transport in [Transport::Pci, Transport::Mmio { pci: false }] {
        let (ram, file) = (ram(), disk_file());
        let Some(pc) = Pc::new(&ram) else { return };
        let mut devices = pc.attach(opened(&[("a", &file)]), transport);
        devices.suspend(soon()).unwrap();
        let good = serde_json::to_value(devices.save()).unwrap();
        drop((devices, pc));
        let first = good["devices"][0].clone();
        let mut doubled = vec![first.clone(); MAX_DEVICES + 1];
        let place = format!("/devices/0/place/{}", if transport == Transport::Pci { "pci" } else { "mmio" });
        let over = |what: &str| format!("{place}/{what}");
        let other_bus =
            if transport == Transport::Pci { Value::Null } else { json!({"root": {"address": 0}, "last_slot": 0}) };
        let mut cases = vec![
            ("/devices/0/id".into(), json!({"disk": "b"}), "disk 'a' is there, and no saved state of it"),
            ("/devices/0/id".into(), json!("entropy"), "there are two saved states of entropy device"),
            ("/devices".into(), json!([first, first, good["devices"][1]]), "there are two saved states of disk 'a'"),
            (
                "/devices".into(),
                json!(std::mem::take(&mut doubled)),
                "there are 32 saved devices, and no VM has more than 31",
            ),
        ];
        if transport == Transport::Pci {
            cases.extend([
                ("/pci".into(), other_bus, "the saved devices have no PCI bus, and the VM has a PCI bus"),
                ("/pci/last_slot".into(), json!(32), "last_slot: there is no slot 32"),
                (over("slot"), json!(0), "disk 'a': slot: the host bridge is in slot 0"),
                (over("slot"), json!(32), "disk 'a': slot: 32, and there are only 32"),
                (over("slot"), json!(2), "entropy device: slot: 2 is another device's too"),
                (
                    over("function/core/own/state/capacity"),
                    json!(2049),
                    "disk 'a': core.own.state.capacity: the guest's disk has 2049 sectors, and there are only 2048",
                ),
                (over("function/mapped"), json!(true), "disk 'a': mapped: the BAR is not decoded"),
            ]);
        } else {
            cases.extend([
                ("/pci".into(), other_bus, "the saved devices have a PCI bus, and the VM has no PCI bus"),
                (over("address"), json!(0xc000_2001u64), "disk 'a': address: 0xc0002001 is no place for a device"),
                (over("gsi"), json!(3), "disk 'a': gsi: 3, and at 0xc0002000 it is 6"),
                (over("address"), json!(0xc000_3000u64), "disk 'a': gsi: 6, and at 0xc0003000 it is 7"),
            ]);
        }
        for (pointer, value, expected) in cases {
            let mut state = good.clone();
            *state.pointer_mut(&pointer).unwrap() = value;
            let saved: DevicesStateV1 = serde_json::from_value(state).unwrap();
            let Some(pc) = Pc::new(&ram) else { return };
            let error = pc.restore(opened(&[("a", &file)]), &saved, transport).err().expect(expected);
            let MachineError::Restore(error) = error else { panic!("{error:?}") };
            let found = match error {
                RestoreError::Device { id, source } => format!("{id}: {source}"),
                RestoreError::Pci(source) => source.to_string(),
                other => other.to_string(),
            };
            assert_eq!(found, expected, "{pointer}");
        }
        let Some(pc) = Pc::new(&ram) else { return };
        let saved = serde_json::from_value(good).unwrap();
        let error = pc.restore(Opened { entropy: None, ..opened(&[("a", &file)]) }, &saved, transport).err().unwrap();
        assert!(matches!(error, MachineError::Restore(RestoreError::Missing(DeviceId::Entropy))), "{error:?}");
        drop(pc);
        let Some(pc) = Pc::new(&ram) else { return };
        pc.restore(opened(&[("a", &file)]), &saved, transport).unwrap();
    }
}

#[test]
fn a_bar_is_where_it_was_or_the_state_is_refused() {
    let ram = ram();
    let Some(pc) = Pc::new(&ram) else { return };
    let mut devices = pc.attach(opened(&[]), Transport::Pci);
    pc.set_up(entropy(&devices));
    devices.suspend(soon()).unwrap();
    let good = devices.save();
    drop(devices);
    for (bar, expected) in [
        (layout::PCI_WINDOW + 0x10_0000, None),
        (1 << 38, None),
        (layout::ECAM, Some("outside of the bridge's windows")),
        (0x8000, Some("outside of the bridge's windows")),
        (1 << 39, Some("outside of the bridge's windows")),
    ] {
        let mut saved = good.clone();
        let PlaceStateV1::Pci { function, .. } = &mut saved.devices[0].place else { panic!("it is on PCI") };
        function.config[0x10..0x18].copy_from_slice(&(bar | 4u64).to_le_bytes());
        let Some(pc) = Pc::new(&ram) else { return };
        match (pc.restore(opened(&[]), &saved, Transport::Pci), expected) {
            (Ok(_devices), None) => {
                let mut queues = [0; 2];
                pc.board.mmio.read(bar + 0x12, &mut queues);
                assert_eq!(queues, [1, 0]);
            }
            (Err(MachineError::Restore(RestoreError::Device { source, .. })), Some(expected)) => {
                assert!(source.problem.contains(expected), "{source}");
            }
            (result, _) => panic!("{bar:#x}: {:?}", result.err()),
        }
    }
}

/// Whatever a file says: it is refused, or becomes a machine that runs and ends.
#[test]
fn mutated_states_do_no_harm() {
    let ram = ram();
    if Pc::new(&ram).is_none() {
        return;
    }
    let states = [Transport::Pci, Transport::Mmio { pci: true }].map(|transport| {
        let pc = Pc::new(&ram).expect("there is KVM");
        let mut devices = pc.attach(opened(&[]), transport);
        pc.set_up(entropy(&devices));
        devices.suspend(soon()).unwrap();
        (transport, serde_json::to_value(devices.save()).unwrap())
    });
    let mutations = prop::collection::vec(prop::collection::vec(any::<u64>(), 1..10), 1..4);
    let mut runner = TestRunner::new(Config { cases: 64, ..Config::default() });
    let result = runner.run(&(any::<bool>(), mutations), |(which, mutations)| {
        let (transport, mut state) = states[usize::from(which)].clone();
        for choices in mutations {
            mutate(&mut state, &mut choices.into_iter());
        }
        let Ok(saved) = serde_json::from_value::<DevicesStateV1>(state) else { return Ok(()) };
        let pc = Pc::new(&ram).expect("there is KVM");
        if let Ok(mut devices) = pc.restore(opened(&[]), &saved, transport) {
            devices.resume();
            devices.suspend(soon()).unwrap();
            prop_assert_eq!(devices.save().devices.len(), 1);
        }
        Ok(())
    });
    result.unwrap();
}
