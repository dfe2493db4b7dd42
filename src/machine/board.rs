//! The board: the buses the vCPUs' accesses go to, and the way back to the owner.

use std::sync::Arc;

use super::events::EventQueue;
use super::lifecycle::End;
use crate::cpu::{ExitHandler, VcpuFault};
use crate::observe::{Milestone, Timeline};
use crate::platform::bus::Bus;
use crate::platform::{EventSink, GuestEvent};

pub struct Board {
    pub ports: Bus,
    pub mmio: Arc<Bus>,
    pub news: Arc<News>,
}

/// Passes on what platform devices notice.
pub struct News {
    pub events: Arc<EventQueue>,
    pub timeline: Arc<Timeline>,
}

impl ExitHandler for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.mmio.read(addr, data);
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.mmio.write(addr, data);
    }

    fn shutdown(&self) {
        self.news.events.end(End::Reset);
    }

    fn fault(&self, fault: VcpuFault) {
        self.news.events.end(End::Fault(fault));
    }

    fn first_entry(&self) {
        self.news.timeline.mark(Milestone::FirstEntry);
    }

    fn all_parked(&self) {
        self.news.events.look();
    }
}

impl EventSink for News {
    fn guest_event(&self, event: GuestEvent) {
        match event {
            GuestEvent::PowerOff => self.events.end(End::PowerOff),
            GuestEvent::Reset => self.events.end(End::Reset),
            GuestEvent::Panicked => self.events.end(End::Panicked),
            GuestEvent::BootMark => self.timeline.mark(Milestone::Userspace),
        }
    }
}
