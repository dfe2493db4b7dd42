//! All that a vCPU is, saved and brought back. (KVM API, 4: the vCPU ioctls.)
//!
//! The order matters. Reading the MP state has KVM take in events that wait for the LAPIC, so it comes first; events
//! themselves come last. Writing: CPUID says what the rest may be, the LAPIC comes before the MSR that its timer
//! belongs to, and the events once more last.

#![expect(unsafe_code, reason = "KVM is handed a buffer whose size it tells by itself")]

use std::io;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::raw::{Raw, RawBytes};
use super::{CpuError, features};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuStateV1 {
    pub cpuid: Vec<Raw<kvm_cpuid_entry2>>,
    /// In kHz; none where KVM cannot tell.
    pub tsc_khz: Option<u32>,
    pub mp_state: Raw<kvm_mp_state>,
    pub regs: Raw<kvm_regs>,
    pub sregs: Raw<kvm_sregs>,
    /// As large as this CPU's is.
    pub xsave: RawBytes,
    pub xcrs: Raw<kvm_xcrs>,
    pub debug_regs: Raw<kvm_debugregs>,
    pub lapic: Raw<kvm_lapic_state>,
    /// Index and value.
    pub msrs: Vec<(u32, u64)>,
    /// Of a guest that runs guests of its own.
    pub nested: Option<Raw<KvmNestedStateBuffer>>,
    pub events: Raw<kvm_vcpu_events>,
}

/// What of a vCPU's state depends on the host.
#[derive(Debug, Clone)]
pub struct StateShape {
    /// What KVM saves of MSRs, and what it leaves out though it has it.
    msrs: Vec<u32>,
    /// Bytes; 0 where KVM knows just the one size.
    xsave: usize,
    xcrs: bool,
    debug_regs: bool,
    nested: bool,
}

const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Fixed-range, variable-range and default MTRRs (Intel SDM volume 4, table 2-2).
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// How far apart two frequencies may be that a guest takes for the same: 250 in a million.
const TSC_TOLERANCE_PPM: u64 = 250;

impl StateShape {
    /// Asks KVM.
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, CpuError> {
        let list = kvm.get_msr_index_list().map_err(CpuError::at("list the MSRs"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.extend(MTRRS.into_iter().flatten());
        // Its timer starts when it is written, by the time stamp counter of then.
        msrs.sort_unstable_by_key(|&index| (index == IA32_TSC_DEADLINE, index));
        msrs.dedup();
        Ok(Self {
            msrs,
            xsave: usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            xcrs: vm.check_extension(Cap::Xcrs),
            debug_regs: vm.check_extension(Cap::Debugregs),
            nested: vm.check_extension(Cap::NestedState),
        })
    }

    fn empty_xsave(&self) -> Result<Xsave, CpuError> {
        let more = self.xsave.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
        Xsave::new(more).map_err(|_| CpuError::XsaveSize(self.xsave))
    }
}

impl VcpuStateV1 {
    /// Reads all of it; `cpuid` is what it was given. The vCPU must not be in the guest.
    pub fn save(vcpu: &VcpuFd, cpuid: &CpuId, shape: &StateShape) -> Result<Self, CpuError> {
        use CpuError as E;
        let mp_state = vcpu.get_mp_state().map_err(E::at("read the MP state"))?;
        let mut nested = KvmNestedStateBuffer::empty();
        let has_nested =
            shape.nested && vcpu.nested_state(&mut nested).map_err(E::at("read the nested state"))?.is_some();
        let xcrs = if shape.xcrs { vcpu.get_xcrs().map_err(E::at("read the XCRs"))? } else { kvm_xcrs::default() };
        let debug_regs = match shape.debug_regs {
            true => vcpu.get_debug_regs().map_err(E::at("read the debug registers"))?,
            false => kvm_debugregs::default(),
        };
        Ok(Self {
            cpuid: cpuid.as_slice().iter().copied().map(Raw).collect(),
            tsc_khz: vcpu.get_tsc_khz().ok(),
            mp_state: Raw(mp_state),
            regs: Raw(vcpu.get_regs().map_err(E::at("read the registers"))?),
            sregs: Raw(vcpu.get_sregs().map_err(E::at("read the system registers"))?),
            xsave: read_xsave(vcpu, shape)?,
            xcrs: Raw(xcrs),
            debug_regs: Raw(debug_regs),
            lapic: Raw(vcpu.get_lapic().map_err(E::at("read the LAPIC"))?),
            msrs: read_msrs(vcpu, &shape.msrs)?,
            nested: has_nested.then_some(Raw(nested)),
            events: Raw(vcpu.get_vcpu_events().map_err(E::at("read a vCPU's events"))?),
        })
    }

    /// Writes all of it to a vCPU that has not run; returns its CPUID.
    pub fn restore(&self, vcpu: &VcpuFd, shape: &StateShape) -> Result<CpuId, CpuError> {
        use CpuError as E;
        let entries: Vec<_> = self.cpuid.iter().map(|entry| entry.0).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| E::CpuidEntries)?;
        vcpu.set_cpuid2(&cpuid).map_err(E::at("set CPUID"))?;
        self.set_tsc_frequency(vcpu)?;
        vcpu.set_mp_state(self.mp_state.0).map_err(E::at("set the MP state"))?;
        vcpu.set_regs(&self.regs.0).map_err(E::at("set the registers"))?;
        vcpu.set_sregs(&self.sregs.0).map_err(E::at("set the system registers"))?;
        write_xsave(vcpu, shape, &self.xsave.0)?;
        if shape.xcrs {
            vcpu.set_xcrs(&self.xcrs.0).map_err(E::at("set the XCRs"))?;
        }
        if shape.debug_regs {
            vcpu.set_debug_regs(&self.debug_regs.0).map_err(E::at("set the debug registers"))?;
        }
        vcpu.set_lapic(&self.lapic.0).map_err(E::at("set the LAPIC"))?;
        write_msrs(vcpu, &self.msrs)?;
        if let Some(nested) = &self.nested {
            vcpu.set_nested_state(&nested.0).map_err(E::at("set the nested state"))?;
        }
        vcpu.set_vcpu_events(&self.events.0).map_err(E::at("set a vCPU's events"))?;
        Ok(cpuid)
    }

    /// Who made the CPU that it ran on, and what of it the guest may be using.
    #[must_use]
    pub fn needs(&self) -> (String, Vec<String>) {
        let cpuid: Vec<_> = self.cpuid.iter().map(|entry| entry.0).collect();
        (features::vendor(&cpuid), features::features(&cpuid))
    }

    /// The time stamp counter has to go on as fast as it went.
    fn set_tsc_frequency(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        let Some(saved) = self.tsc_khz else { return Ok(()) };
        match vcpu.get_tsc_khz() {
            Ok(here) if u64::from(here.abs_diff(saved)) * 1_000_000 <= u64::from(here) * TSC_TOLERANCE_PPM => Ok(()),
            _ => vcpu.set_tsc_khz(saved).map_err(CpuError::at("set the frequency of the time stamp counter")),
        }
    }
}

fn read_xsave(vcpu: &VcpuFd, shape: &StateShape) -> Result<RawBytes, CpuError> {
    let mut xsave = shape.empty_xsave()?;
    if shape.xsave == 0 {
        let plain = vcpu.get_xsave().map_err(CpuError::at("read the FPU's state"))?;
        return Ok(RawBytes(plain.region.iter().flat_map(|word| word.to_le_bytes()).collect()));
    }
    // SAFETY: the buffer has the size that KVM says it needs, and nothing here turns on more of the CPU's state.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(CpuError::at("read the FPU's state"))?;
    let words = xsave.as_fam_struct_ref().xsave.region.iter().chain(xsave.as_slice());
    Ok(RawBytes(words.flat_map(|word| word.to_le_bytes()).collect()))
}

fn write_xsave(vcpu: &VcpuFd, shape: &StateShape, bytes: &[u8]) -> Result<(), CpuError> {
    let mut xsave = shape.empty_xsave()?;
    let room = size_of::<kvm_xsave>() + size_of_val(xsave.as_slice());
    if bytes.len() > room {
        return Err(CpuError::XsaveSize(bytes.len()));
    }
    let mut words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    // SAFETY: the number of elements stays as it is.
    let header = unsafe { xsave.as_mut_fam_struct() };
    header.xsave.region.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    xsave.as_mut_slice().iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    // SAFETY: as in `read_xsave`.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(CpuError::at("set the FPU's state"))
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, CpuError> {
    let entry = |&index: &u32| kvm_msr_entry { index, ..Default::default() };
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().take(MSRS_AT_ONCE).map(entry).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| CpuError::MsrEntries)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(CpuError::at("read the MSRs"))?;
        values.extend(msrs.as_slice()[..read.min(entries.len())].iter().map(|entry| (entry.index, entry.data)));
        // What stopped it is listed, but not there for this guest.
        rest = rest.get(read + usize::from(read < entries.len())..).unwrap_or_default();
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), CpuError> {
    let entry = |&(index, data): &(u32, u64)| kvm_msr_entry { index, data, ..Default::default() };
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().take(MSRS_AT_ONCE).map(entry).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| CpuError::MsrEntries)?;
        let written = vcpu.set_msrs(&msrs).map_err(CpuError::at("set the MSRs"))?;
        if let Some(refused) = entries.get(written) {
            // KVM refuses to write some that a guest cannot change either: they have their value then.
            if read_msrs(vcpu, &[refused.index])? != [(refused.index, refused.data)] {
                return Err(CpuError::Msr { index: refused.index, value: refused.data });
            }
        }
        rest = rest.get(written + usize::from(written < entries.len())..).unwrap_or_default();
    }
    Ok(())
}

/// KVM's limit (`MAX_IO_MSRS`).
const MSRS_AT_ONCE: usize = 256;

/// Another way to a vCPU whose thread waits outside of the guest.
///
/// # Errors
/// When this process has no descriptors left.
pub fn second_handle(vm: &VmFd, vcpu: std::os::fd::RawFd) -> Result<VcpuFd, CpuError> {
    let failed = |source| CpuError::Kvm { what: "reach a vCPU", source };
    // SAFETY: the caller's descriptor is open, and only duplicated.
    let copy = unsafe { libc::fcntl(vcpu, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the duplicate is a vCPU's descriptor of this VM, and ours alone.
    unsafe { vm.create_vcpu_from_rawfd(copy) }.map_err(|error| failed(error.into()))
}
