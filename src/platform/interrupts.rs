//! Interrupts into the guest: the one table of GSI and MSI routes, and doorbells out of it.
//!
//! GSIs 0 to 23 are the IOAPIC's pins (0 to 15 also the PIC's); each MSI vector has one GSI of its own after
//! them. KVM takes the table as a whole, so it is handed over only when a message really changes.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::IOAPIC_PINS;
use crate::virtio::Doorbells;
use crate::virtio::pci::{MsiMessage, PciHost};

/// KVM's limit (`KVM_MAX_IRQ_ROUTES`), less the pins of the PICs and the IOAPIC.
const MAX_MESSAGES: usize = 4096 - 40;

pub struct Interrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

/// Message routes, each a GSI from `IOAPIC_PINS` up.
#[derive(Default)]
struct Routes {
    messages: Vec<Option<MsiMessage>>,
    /// Those that have been given back.
    free: Vec<u32>,
    /// KVM gets the table when all changes are made.
    held_back: bool,
}

impl Routes {
    fn allocate(&mut self) -> Option<u32> {
        if let Some(gsi) = self.free.pop() {
            return Some(gsi);
        }
        if self.messages.len() >= MAX_MESSAGES {
            return None;
        }
        self.messages.push(None);
        Some(IOAPIC_PINS + self.messages.len() as u32 - 1)
    }

    /// Nothing listens on it any more, so that KVM may keep what it has until the table changes anyway.
    fn release(&mut self, gsi: u32) {
        if let Some(message) = self.message(gsi) {
            *message = None;
            self.free.push(gsi);
        }
    }

    fn message(&mut self, gsi: u32) -> Option<&mut Option<MsiMessage>> {
        self.messages.get_mut(gsi.checked_sub(IOAPIC_PINS)? as usize)
    }
}

impl Interrupts {
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::default() }
    }

    /// An eventfd that raises an edge on an IOAPIC pin.
    ///
    /// # Errors
    /// When the host is out of descriptors or KVM refuses.
    pub fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.vm.register_irqfd(&fd, gsi)?;
        Ok(fd)
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_message(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.routes();
        let slot = routes.message(gsi).ok_or(io::ErrorKind::InvalidInput)?;
        if *slot == Some(message) {
            return Ok(());
        }
        let before = slot.replace(message);
        if routes.held_back {
            return Ok(());
        }
        self.hand_over(&routes).inspect_err(|_| {
            if let Some(slot) = routes.message(gsi) {
                *slot = before;
            }
        })
    }

    fn hand_over(&self, routes: &Routes) -> io::Result<()> {
        let entries = routing_entries(&routes.messages);
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }

    /// Has KVM take the table once, after all that `change` does to it. No message is sent before that.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn at_once<T>(&self, change: impl FnOnce() -> T) -> io::Result<T> {
        self.routes().held_back = true;
        let result = change();
        let mut routes = self.routes();
        routes.held_back = false;
        if routes.messages.iter().any(Option::is_some) {
            self.hand_over(&routes)?;
        }
        Ok(result)
    }
}

impl Doorbells for Interrupts {
    fn attach_doorbell(&self, addr: u64, value: Option<u32>, fd: &EventFd) -> io::Result<()> {
        let addr = IoEventAddress::Mmio(addr);
        match value {
            None => self.vm.register_ioevent(fd, &addr, NoDatamatch)?,
            Some(value) => self.vm.register_ioevent(fd, &addr, value)?,
        }
        Ok(())
    }

    fn detach_doorbell(&self, addr: u64, value: Option<u32>, fd: &EventFd) {
        let addr = IoEventAddress::Mmio(addr);
        // It was never attached, or the VM is gone: either way nothing listens.
        let _ = match value {
            None => self.vm.unregister_ioevent(fd, &addr, NoDatamatch),
            Some(value) => self.vm.unregister_ioevent(fd, &addr, value),
        };
    }
}

impl PciHost for Interrupts {
    fn allocate_route(&self) -> io::Result<u32> {
        self.routes().allocate().ok_or_else(|| io::Error::other("all interrupt routes are taken"))
    }

    fn release_route(&self, route: u32) {
        self.routes().release(route);
    }

    fn connect(&self, route: u32, message: MsiMessage, fd: &EventFd) -> io::Result<()> {
        self.set_message(route, message)?;
        Ok(self.vm.register_irqfd(fd, route)?)
    }

    fn disconnect(&self, route: u32, fd: &EventFd) {
        let _ = self.vm.unregister_irqfd(fd, route);
    }
}

fn routing_entries(messages: &[Option<MsiMessage>]) -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let mut entries: Vec<_> = (0..8)
        .map(|gsi| pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi))
        .chain((8..16).map(|gsi| pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)))
        // As KVM's own default has it, and a MADT without overrides.
        .chain((0..IOAPIC_PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
        .collect();
    let messages = messages.iter().zip(IOAPIC_PINS..).filter_map(|(message, gsi)| message.map(|m| (gsi, m)));
    entries.extend(messages.map(|(gsi, message)| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }));
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_used_again() {
        let mut routes = Routes::default();
        let all: Vec<u32> = std::iter::from_fn(|| routes.allocate()).collect();
        assert_eq!((all.len(), all[0]), (MAX_MESSAGES, IOAPIC_PINS));
        *routes.message(30).unwrap() = Some(MsiMessage { address: 1, data: 2 });
        routes.release(30);
        assert_eq!(*routes.message(30).unwrap(), None);
        assert_eq!((routes.allocate(), routes.allocate()), (Some(30), None));
        // A pin is no route.
        routes.release(3);
        assert_eq!(routes.allocate(), None);
    }

    #[test]
    fn every_pin_and_every_message_has_its_route() {
        let message = MsiMessage { address: 0xfee0_1000, data: 0x31 };
        let entries = routing_entries(&[None, Some(message)]);
        assert_eq!(entries.len(), 16 + 24 + 1);
        let last = entries.last().unwrap();
        assert_eq!((last.gsi, last.type_), (25, KVM_IRQ_ROUTING_MSI));
        for gsi in 0..24 {
            assert!(entries.iter().any(|e| e.gsi == gsi && e.type_ == KVM_IRQ_ROUTING_IRQCHIP));
        }
    }
}
