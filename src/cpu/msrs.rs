//! MSRs a vCPU starts with, where KVM's own reset values are not what firmware leaves behind.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::CpuError;

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
