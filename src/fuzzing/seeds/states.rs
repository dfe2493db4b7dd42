//! Saved states of each device, fresh and with a queue that runs.

use serde_json::{Value, json};
use vm_memory::GuestAddress;

use super::plant;
use crate::fuzzing::input::Input;
use crate::fuzzing::machine::{Host, devices, eventfd};
use crate::fuzzing::queues::{MEMORY, layout};
use crate::fuzzing::states::restore;
use crate::memory::anonymous;
use crate::platform::layout::VIRTIO_MMIO;
use crate::platform::pci::PciRoot;
use crate::virtio::feature;
use crate::virtio::mmio::VirtioMmio;
use crate::virtio::pci::VirtioPci;

#[test]
fn states_of_every_device() {
    for which in 0..6u8 {
        let ram = anonymous(&[(GuestAddress(0), MEMORY)]).unwrap();
        let device = Box::new(devices().0.remove(usize::from(which >> 1)));
        let host = std::sync::Arc::<Host>::default();
        let fresh = if which & 1 == 0 {
            serde_json::to_value(VirtioPci::new(device, ram, host, PciRoot::initial_bar(1)).unwrap().save())
        } else {
            serde_json::to_value(VirtioMmio::new(device, ram, host, VIRTIO_MMIO, eventfd()).unwrap().save())
        };
        let fresh = fresh.unwrap();
        let mut running = fresh.clone();
        let core = &mut running["core"];
        core["status"] = json!(15);
        core["driver_features"] = json!(feature::VERSION_1 | feature::EVENT_IDX);
        core["queues"][0]["enabled"] = json!(true);
        core["queues"][0]["layout"] = serde_json::to_value(layout(0, 16)).unwrap();
        core["queues"][0]["progress"] = json!({"next_avail": 0, "next_used": 0});
        if which & 1 == 0 {
            running["config"][4] = json!(6);
            running["mapped"] = json!(true);
            running["vectors"][0]["pending"] = json!(true);
        }
        for (what, state) in [("fresh", &fresh), ("running", &running)] {
            let seed = [&[which][..], &serde_json::to_vec(state).unwrap()].concat();
            assert_eq!(restore(&mut Input(&seed)), Some(true), "device {which}, {what}");
            plant("states", &format!("{which}-{what}"), &seed);
        }
        let truncated = [&[which][..], &serde_json::to_vec(&fresh).unwrap()[..100]].concat();
        assert_eq!(restore(&mut Input(&truncated)), None);
        let mut wrong = fresh;
        wrong["core"]["isr"] = Value::from(64);
        let seed = [&[which][..], &serde_json::to_vec(&wrong).unwrap()].concat();
        assert_eq!(restore(&mut Input(&seed)), Some(false));
    }
}
