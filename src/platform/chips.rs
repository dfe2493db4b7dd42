//! What KVM keeps of a PC besides its vCPUs: interrupt controllers, timer and clock, saved and brought back.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::cpu::Raw;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChipsStateV1 {
    pub pic_master: Raw<kvm_irqchip>,
    pub pic_slave: Raw<kvm_irqchip>,
    pub ioapic: Raw<kvm_irqchip>,
    pub pit: Raw<kvm_pit_state2>,
    pub clock: Raw<kvm_clock_data>,
}

/// What the guest's clock does about the time between saving and going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// It goes on from where it was.
    #[default]
    Continue,
    /// It has gone on meanwhile, as the host's has.
    Advance,
}

impl ChipsStateV1 {
    /// # Errors
    /// KVM's.
    pub fn save(vm: &VmFd) -> Result<Self, kvm_ioctls::Error> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map(|()| Raw(chip))
        };
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: Raw(vm.get_pit2()?),
            clock: Raw(vm.get_clock()?),
        })
    }

    /// Brings it back, once the vCPUs' LAPICs are there: the IOAPIC passes on what it holds at once.
    ///
    /// # Errors
    /// KVM's.
    pub fn restore(&self, vm: &VmFd, clock: Clock) -> Result<(), kvm_ioctls::Error> {
        vm.set_pit2(&self.pit.0)?;
        vm.set_clock(&self.clock_to_set(clock))?;
        for (chip, chip_id) in [
            (&self.pic_master, KVM_IRQCHIP_PIC_MASTER),
            (&self.pic_slave, KVM_IRQCHIP_PIC_SLAVE),
            (&self.ioapic, KVM_IRQCHIP_IOAPIC),
        ] {
            // Whatever a file says: it is this chip.
            vm.set_irqchip(&kvm_irqchip { chip_id, ..chip.0 })?;
        }
        Ok(())
    }

    fn clock_to_set(&self, clock: Clock) -> kvm_clock_data {
        let saved = self.clock.0;
        // Where the time of day was not saved with it, there is nothing to go by.
        let flags = if clock == Clock::Advance { saved.flags & KVM_CLOCK_REALTIME } else { 0 };
        kvm_clock_data { clock: saved.clock, flags, realtime: saved.realtime, ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_on_or_catches_up() {
        let clock = kvm_clock_data { clock: 5, flags: !0, realtime: 7, host_tsc: 9, ..Default::default() };
        let mut state = ChipsStateV1 {
            pic_master: Raw::default(),
            pic_slave: Raw::default(),
            ioapic: Raw::default(),
            pit: Raw::default(),
            clock: Raw(clock),
        };
        let set = state.clock_to_set(Clock::Continue);
        assert_eq!((set.clock, set.flags), (5, 0));
        let set = state.clock_to_set(Clock::Advance);
        assert_eq!((set.clock, set.flags, set.realtime), (5, KVM_CLOCK_REALTIME, 7));
        state.clock.0.flags = 0;
        assert_eq!(state.clock_to_set(Clock::Advance).flags, 0);
    }
}
