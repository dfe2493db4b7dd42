//! MSRs a vCPU starts with: a user's changes, and then what firmware leaves behind where KVM's own reset values are
//! otherwise.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::CpuError;
use crate::config::MsrChange;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: Linux takes uncached memory for slow and refuses PAT without MTRRs.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const BOOT_MSRS: [(u32, u64); 2] =
    [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)];

/// Sets the boot MSRs; those this KVM does not have are left out with a note in the log.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), CpuError> {
    let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).expect("fewer entries than the limit");
        let set = vcpu.set_msrs(&msrs).map_err(CpuError::at("set the boot MSRs"))?;
        if let Some(refused) = rest.get(set) {
            tracing::debug!("KVM does not take MSR {:#x}", refused.index);
        }
        rest = rest.get(set + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Changes MSRs one by one, as each may be changed again.
pub fn change_msrs(vcpu: &VcpuFd, changes: &[MsrChange]) -> Result<(), CpuError> {
    for &MsrChange { index, bits } in changes {
        let one = |data| {
            Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
                .expect("fewer entries than the limit")
        };
        let mut old = one(0);
        if vcpu.get_msrs(&mut old).map_err(CpuError::at("read an MSR"))? == 0 {
            return Err(CpuError::NoMsr { index });
        }
        let value = bits.apply(old.as_slice()[0].data);
        if vcpu.set_msrs(&one(value)).map_err(CpuError::at("set an MSR"))? == 0 {
            return Err(CpuError::MsrValue { index, value });
        }
    }
    Ok(())
}
