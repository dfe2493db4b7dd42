use super::*;
use crate::virtio::testing::{FakeHost, function};
use proptest::prelude::*;

struct Pc {
    mmio: Arc<Bus>,
    ports: Bus,
    root: Arc<Mutex<PciRoot>>,
    hosts: Vec<Arc<FakeHost>>,
}

/// Functions in slots 1 and 2.
fn pc() -> Pc {
    let (mmio, ports) = (Arc::<Bus>::default(), Bus::default());
    let root = Arc::new(Mutex::new(PciRoot::new(&mmio, Some((1 << 38, 1 << 39)))));
    let hosts = [1, 2].map(|slot| plug(&root, slot)).into();
    assert!(ports.insert(CONFIG_PORTS.into(), CONFIG_PORTS_LEN, Arc::new(Mutex::new(ConfigPorts(root.clone())))));
    assert!(mmio.insert(layout::ECAM, layout::ECAM_SIZE, Arc::new(Mutex::new(Ecam(root.clone())))));
    Pc { mmio, ports, root, hosts }
}

fn plug(root: &Mutex<PciRoot>, slot: usize) -> Arc<FakeHost> {
    let (function, host, _) = function(PciRoot::initial_bar(slot));
    PciRoot::insert(root, slot, function);
    host
}

fn ecam(slot: u64, offset: u64) -> u64 {
    layout::ECAM + (slot << 15) + offset
}

fn read32(bus: &Bus, addr: u64) -> u32 {
    let mut data = [0; 4];
    bus.read(addr, &mut data);
    u32::from_le_bytes(data)
}

impl Pc {
    fn config_read(&self, slot: u64, offset: u64) -> u32 {
        read32(&self.mmio, ecam(slot, offset))
    }

    fn move_bar(&self, slot: u64, to: u64) {
        self.mmio.write(ecam(slot, 0x04), &[0, 0]);
        self.mmio.write(ecam(slot, 0x10), &(to as u32).to_le_bytes());
        self.mmio.write(ecam(slot, 0x14), &((to >> 32) as u32).to_le_bytes());
        self.mmio.write(ecam(slot, 0x04), &[2, 0]);
    }

    /// Does a function tell its number of queues at `bar`?
    fn answers(&self, bar: u64) -> bool {
        let mut data = [0; 2];
        self.mmio.read(bar + 0x12, &mut data);
        data == [2, 0]
    }
}

#[test]
fn both_ways_to_the_configuration_space_lead_to_the_same_functions() {
    let pc = pc();
    for slot in 0..32 {
        for offset in [0, 4, 8, 0x34, 0xfc] {
            pc.ports.write(0xcf8, &(1u32 << 31 | (slot as u32) << 11 | offset as u32).to_le_bytes());
            assert_eq!(read32(&pc.ports, 0xcfc), pc.config_read(slot, offset), "slot {slot}, {offset:#x}");
        }
        assert_eq!(read32(&pc.mmio, ecam(slot, 0x1000)), u32::MAX, "one function a slot");
        assert_eq!(pc.config_read(slot, 0) != u32::MAX, slot < 3);
    }
    // Another bus, another function, the enable bit off.
    for address in [1u32 << 31 | 1 << 16 | 1 << 11, 1 << 31 | 1 << 11 | 1 << 8, 1 << 11] {
        pc.ports.write(0xcf8, &address.to_le_bytes());
        assert_eq!(read32(&pc.ports, 0xcf8), address);
        assert_eq!(read32(&pc.ports, 0xcfc), u32::MAX);
    }
}

#[test]
fn a_bar_goes_where_nothing_else_is() {
    let pc = pc();
    let (first, second) = (PciRoot::initial_bar(1), 0x40_0000_0000);
    assert!(!pc.answers(first), "memory is off");
    pc.move_bar(1, first);
    assert!(pc.answers(first));
    pc.move_bar(2, second);
    assert!(pc.answers(second));
    assert_eq!(pc.hosts[1].doorbells(), [(second + 0x3000, None), (second + 0x3004, None)]);

    // Over another function, the configuration space, RAM, the platform's registers, the interrupt controllers,
    // over the edges of the windows and around the end of the address space.
    let window_end = layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE;
    let outside = [0x10_0000, layout::EVENT_DEVICE & !0x7fff, layout::IOAPIC, layout::LAPIC, layout::GAP_END];
    let edges = [layout::PCI_WINDOW - BAR_SIZE, window_end, (1 << 38) - BAR_SIZE, 1 << 39, !0x7fff];
    for taken in [first, layout::ECAM].into_iter().chain(outside).chain(edges) {
        pc.move_bar(2, taken);
        assert!(pc.hosts[1].doorbells().is_empty(), "{taken:#x}");
        assert!(pc.answers(first) && !pc.answers(second));
    }
    assert_eq!(pc.config_read(1, 0) >> 16, 0x1044, "the configuration space is where it was");
    for free in [second, window_end - BAR_SIZE, (1 << 39) - BAR_SIZE] {
        pc.move_bar(2, free);
        assert!(pc.answers(free), "{free:#x}");
    }
}

#[test]
fn slots_are_filled_in_turn() {
    let pc = pc();
    let free = |after| PciRoot::free_slot(&pc.root, after);
    assert_eq!((free(0), free(2), free(30), free(31)), (Some(3), Some(3), Some(31), Some(3)));
    for slot in 3..=31 {
        plug(&pc.root, slot);
    }
    assert!((0..=31).all(|after| free(after).is_none()));
    assert!(PciRoot::remove(&pc.root, 7).is_some());
    assert!((0..=31).all(|after| free(after) == Some(7)));
}

#[test]
fn a_function_that_is_taken_away_leaves_nothing() {
    let mut pc = pc();
    let bar = 0x40_0000_0000;
    pc.move_bar(1, bar);
    pc.move_bar(2, PciRoot::initial_bar(2));
    // Somebody is on the way to it while it goes.
    let on_the_way = lock(&pc.root).slots[1].clone().unwrap();
    let function = PciRoot::remove(&pc.root, 1).unwrap();
    assert!(pc.hosts[0].doorbells().is_empty());
    assert!(PciRoot::remove(&pc.root, 1).is_none());

    assert!(!pc.answers(bar) && pc.answers(PciRoot::initial_bar(2)));
    assert_eq!(pc.config_read(1, 0), u32::MAX, "there is nobody");
    let mut data = [0xff; 2];
    lock(&on_the_way).read(0x12, &mut data);
    lock(&on_the_way).write(0x14, &[1]);
    assert_eq!(data, [0xff; 2]);
    // Neither do its registers map it again.
    pc.move_bar(1, bar);
    assert!(!pc.answers(bar) && pc.hosts[0].doorbells().is_empty());
    drop(function);
    assert_eq!(pc.hosts[0].routes(), 0);

    // The next one has the slot, and the address, for itself.
    pc.hosts[0] = plug(&pc.root, 1);
    pc.move_bar(1, bar);
    assert!(pc.answers(bar));
    assert_eq!(pc.hosts[0].doorbells(), [(bar + 0x3000, None), (bar + 0x3004, None)]);
}

/// Two CPUs of a guest move BARs about and look everywhere while functions come and go.
#[test]
fn nothing_is_left_behind_by_whatever_order() {
    let pc = pc();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        for slot in 1..=2 {
            let (pc, done) = (&pc, &done);
            threads.spawn(move || {
                let places = [layout::PCI_WINDOW + 0x10_0000, 0x40_0000_0000, 0x40_0000_8000];
                for place in places.iter().cycle() {
                    if done.load(std::sync::atomic::Ordering::Relaxed) {
                        return;
                    }
                    pc.move_bar(slot, *place);
                    pc.answers(*place);
                    pc.config_read(3 - slot, 0);
                }
            });
        }
        for round in 0..2000 {
            let slot = 1 + round % 2;
            let gone = PciRoot::remove(&pc.root, slot).unwrap();
            let host = plug(&pc.root, slot);
            drop(gone);
            if round > 1 && round % 100 == 0 {
                std::thread::yield_now();
            }
            if round < 2 {
                assert_eq!((pc.hosts[round].routes(), pc.hosts[round].doorbells()), (0, vec![]));
            }
            drop(host);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for slot in 1..=2 {
        pc.move_bar(slot, PciRoot::initial_bar(slot as usize));
    }
    assert!(pc.answers(PciRoot::initial_bar(1)) && pc.answers(PciRoot::initial_bar(2)));
    for slot in 1..=2 {
        drop(PciRoot::remove(&pc.root, slot));
        assert!(!pc.answers(PciRoot::initial_bar(slot)));
    }
    // The bus holds the configuration space, and nothing that was ever behind a BAR.
    for place in [layout::PCI_WINDOW + 0x10_0000, 0x40_0000_0000, 0x40_0000_8000] {
        assert!(!pc.answers(place), "{place:#x}");
    }
}

#[test]
fn the_functions_go_with_their_bus() {
    let Pc { mmio, ports, root, hosts } = pc();
    let host = Arc::downgrade(&hosts[0]);
    drop((mmio, ports, root, hosts));
    assert!(host.upgrade().is_none(), "a function still holds its host");
}

proptest! {
    #[test]
    fn no_access_breaks_the_root(
        accesses in prop::collection::vec(
            (0u64..3, 0u64..4, prop_oneof![0u64..0x40, 0u64..0x1000], prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>()),
            0..100,
        ),
    ) {
        let pc = pc();
        for (way, slot, offset, width, value) in accesses {
            let data = &value.to_le_bytes()[..width];
            let (bus, addr) = match way {
                0 => (&pc.ports, 0xcf8 + offset % 8),
                1 => (&*pc.mmio, ecam(slot, offset)),
                _ => (&*pc.mmio, pc.hosts.iter().flat_map(|h| h.doorbells()).next().map_or(value, |(bell, _)| bell & !0x7fff | offset << 3)),
            };
            bus.write(addr, data);
            bus.read(addr, &mut data.to_vec());
            for (slot, host) in (1..).zip(&pc.hosts) {
                let on = pc.config_read(slot, 4) & 2 != 0;
                let bar = u64::from(pc.config_read(slot, 0x14)) << 32 | u64::from(pc.config_read(slot, 0x10) & !0xf);
                let doorbells = host.doorbells();
                prop_assert!(doorbells.is_empty() || on && doorbells == [(bar + 0x3000, None), (bar + 0x3004, None)]);
            }
        }
    }
}
