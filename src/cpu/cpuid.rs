//! CPUID as a guest sees it: what KVM supports, with a user's changes, and this VM's topology over both.
//!
//! All vCPUs are of one package, each a core or, with two threads a core, half of one; the APIC ID is the vCPU's index,
//! so that its lowest bit tells the threads of a core apart. Leaf numbers and fields: Intel SDM volume 2, CPUID; AMD APM
//! volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::features::{self, Incompatible};
use super::{CpuError, Raw};
use crate::config::{CpuidChange, CpuidRegister};

/// What KVM supports on this host: asked once, shaped per vCPU.
pub struct HostCpuid {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXTENDED_TOPOLOGY: u32 = 0x8000_0026;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_TOPOEXT: u32 = 1 << 22;
const CACHES: u32 = 0x8000_001d;
const CORE: u32 = 0x8000_001e;

/// How the vendor's name starts.
const AMD_LIKE: [[u8; 4]; 2] = [*b"Auth", *b"Hygo"];

/// How many vCPUs there are, and how many of them make a core.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    pub cpus: u8,
    /// 1, or 2 with an even number of vCPUs.
    pub threads_per_core: u8,
}

impl Topology {
    /// Bits of an APIC ID that number the threads of a core.
    fn thread_bits(self) -> u32 {
        self.threads_per_core.max(1).ilog2()
    }

    /// Bits of an APIC ID that number the vCPUs of the package.
    fn id_bits(self) -> u32 {
        u8::BITS - self.cpus.saturating_sub(1).leading_zeros()
    }
}

impl HostCpuid {
    pub fn new(kvm: &Kvm, changes: &[CpuidChange]) -> Result<Self, CpuError> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuError::at("read the supported CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let mut host = Self { entries: cpuid.as_slice().to_vec(), tsc_deadline };
        changes.iter().try_for_each(|change| host.change(change))?;
        Ok(host)
    }

    fn change(&mut self, change: &CpuidChange) -> Result<(), CpuError> {
        let CpuidChange { leaf, subleaf, .. } = *change;
        let mut entries = self.entries.iter_mut();
        let entry = entries.find(|entry| (entry.function, entry.index) == (leaf, subleaf));
        let entry = entry.ok_or(CpuError::NoCpuid { leaf, subleaf })?;
        entry.flags = change.flags;
        for (register, bits) in &change.registers {
            let register = match register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            *register = bits.apply_32(*register);
        }
        Ok(())
    }

    /// Bits of a physical address the guest may use.
    #[must_use]
    pub fn physical_address_bits(&self) -> u8 {
        let leaf = self.entries.iter().find(|e| e.function == 0x8000_0008);
        leaf.map_or(36, |e| (e.eax & 0xff) as u8)
    }

    /// Can a guest go on here that was saved with this CPUID?
    ///
    /// # Errors
    /// What is missing.
    pub fn check(&self, saved: &[Raw<kvm_cpuid_entry2>]) -> Result<(), Incompatible> {
        let saved: Vec<_> = saved.iter().map(|entry| entry.0).collect();
        features::check(&saved, &self.entries)
    }

    /// CPUID of vCPU `id`.
    pub fn for_vcpu(&self, id: u8, topology: Topology) -> Result<CpuId, CpuError> {
        CpuId::from_entries(&self.shape(id, topology)).map_err(|_| CpuError::CpuidEntries)
    }

    fn shape(&self, id: u8, topology: Topology) -> Vec<kvm_cpuid_entry2> {
        let (apic_id, cpus) = (u32::from(id), u32::from(topology.cpus));
        let (thread_bits, id_bits) = (topology.thread_bits(), topology.id_bits());
        let threads = 1 << thread_bits;
        let topology_leaves = [0xb, 0x1f];
        // AMD's own list of levels tells of the host's cores; a guest falls back to leaf 0xb.
        let host_only = |function| topology_leaves.contains(&function) || function == EXTENDED_TOPOLOGY;
        let mut entries: Vec<_> = self.entries.iter().filter(|e| !host_only(e.function)).copied().collect();
        // Intel reserves what AMD keeps here, and Linux takes it at its word.
        let amd = entries.iter().any(|e| e.function == 0 && AMD_LIKE.contains(&e.ebx.to_le_bytes()));
        if amd && threads > 1 {
            tell_of_threads(&mut entries);
        }
        for entry in &mut entries {
            match entry.function {
                0x1 => {
                    entry.ebx = entry.ebx & 0x0000_ffff | apic_id << 24 | (1 << id_bits) << 16;
                    entry.ecx |= LEAF1_ECX_HYPERVISOR;
                    // KVM emulates the timer but leaves the bit to us.
                    set(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, self.tsc_deadline);
                    set(&mut entry.edx, LEAF1_EDX_HTT, cpus > 1);
                }
                // Caches: levels 1 and 2 belong to one core, level 3 to all.
                0x4 => {
                    let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << id_bits) - 1 } else { threads - 1 };
                    entry.eax = entry.eax & 0x3fff | sharing << 14;
                    if entry.eax & 0x1f != 0 {
                        entry.eax |= ((1 << (id_bits - thread_bits)) - 1) << 26;
                    }
                }
                0x8000_0001 if amd => set(&mut entry.ecx, EXT1_ECX_CMP_LEGACY, cpus > 1),
                0x8000_0008 if amd => entry.ecx = entry.ecx & !0xf0ff | id_bits << 12 | (cpus - 1),
                // A list that ends at once stays one.
                CACHES if entry.eax & 0x1f != 0 => {
                    let sharing = if entry.eax >> 5 & 7 >= 3 { cpus - 1 } else { threads - 1 };
                    entry.eax = entry.eax & 0x3fff | sharing << 14;
                }
                CORE => {
                    // The core's number, and how many threads it has besides the first.
                    (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id >> thread_bits | (threads - 1) << 8, 0);
                }
                _ => {}
            }
        }
        let highest = entries.iter().map(|e| e.function).filter(|f| *f < 0x4000_0000).max().unwrap_or(0);
        for function in topology_leaves.into_iter().filter(|f| *f <= highest) {
            entries.extend(levels(function, apic_id, topology));
        }
        entries
    }
}

/// Makes room for what AMD says of threads: its guests look for them here and nowhere else, also on a host whose CPUs
/// have none. A list of caches goes with it; one that nobody has filled ends at once.
fn tell_of_threads(entries: &mut Vec<kvm_cpuid_entry2>) {
    for entry in entries.iter_mut() {
        match entry.function {
            0x8000_0000 => entry.eax = entry.eax.max(CORE),
            0x8000_0001 => entry.ecx |= EXT1_ECX_TOPOEXT,
            _ => {}
        }
    }
    for (function, flags) in [(CACHES, KVM_CPUID_FLAG_SIGNIFCANT_INDEX), (CORE, 0)] {
        if entries.iter().all(|entry| entry.function != function) {
            entries.push(kvm_cpuid_entry2 { function, flags, ..Default::default() });
        }
    }
}

/// Levels of leaf 0xb or 0x1f, each with the number of vCPUs in one of its kind: a core, the package, the end.
fn levels(function: u32, apic_id: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index, shift, logical, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: index | kind << 8,
        edx: apic_id,
        ..Default::default()
    };
    let thread_bits = topology.thread_bits();
    [
        level(0, thread_bits, 1 << thread_bits, THREAD),
        level(1, topology.id_bits(), topology.cpus.into(), CORE),
        level(2, 0, 0, 0),
    ]
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn host() -> HostCpuid {
        let mut cache = [leaf(4, 0), leaf(4, 3), leaf(4, 4)];
        cache[0].eax = 0xffff_c001 | 1 << 5;
        cache[1].eax = 0xffff_c003 | 3 << 5;
        cache[2].eax = 0;
        let vendor = kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*b"Auth"), ..leaf(0, 0) };
        let mut entries = vec![vendor, leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x1f, 0), leaf(0x20, 0)];
        entries.extend(cache);
        entries.extend([leaf(0x8000_0001, 0), leaf(0x8000_0008, 0), leaf(0x8000_001e, 0), leaf(EXTENDED_TOPOLOGY, 0)]);
        entries.push(kvm_cpuid_entry2 { eax: 0xffff_c001 | 1 << 5, ..leaf(0x8000_001d, 0) });
        HostCpuid { entries, tsc_deadline: true }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = entries.iter().filter(|e| e.function == function && e.index == index).collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        *found[0]
    }

    fn cores(cpus: u8) -> Topology {
        Topology { cpus, threads_per_core: 1 }
    }

    #[test]
    fn every_count_has_room_for_every_apic_id() {
        for count in 1..=64u8 {
            for id in 0..count {
                let entries = host().shape(id, cores(count));
                let basic = find(&entries, 1, 0);
                assert_eq!(basic.ebx >> 24, u32::from(id));
                let addressable = basic.ebx >> 16 & 0xff;
                assert!(addressable.is_power_of_two() && addressable >= u32::from(count));
                assert_eq!(basic.edx & LEAF1_EDX_HTT != 0, count > 1);
                for function in [0xb, 0x1f] {
                    let core = find(&entries, function, 1);
                    assert_eq!((core.ebx, core.ecx, core.edx), (count.into(), 0x201, id.into()));
                    assert_eq!(1 << core.eax, addressable, "all APIC IDs are of one package");
                    let thread = find(&entries, function, 0);
                    assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
                    assert_eq!(find(&entries, function, 2).ecx, 2, "the list ends");
                }
                assert_eq!(find(&entries, 0x8000_0008, 0).ecx & 0xff, u32::from(count) - 1);
                assert_eq!(1 << (find(&entries, 0x8000_0008, 0).ecx >> 12 & 0xf), addressable);
                let extended = find(&entries, 0x8000_001e, 0);
                assert_eq!((extended.eax, extended.ebx), (id.into(), id.into()));
                assert!(entries.iter().all(|e| e.function != EXTENDED_TOPOLOGY));
            }
        }
    }

    #[test]
    fn two_threads_share_a_core() {
        for count in (2..=64u8).step_by(2) {
            for id in 0..count {
                let entries = host().shape(id, Topology { cpus: count, threads_per_core: 2 });
                let addressable = find(&entries, 1, 0).ebx >> 16 & 0xff;
                assert!(addressable.is_power_of_two() && addressable >= u32::from(count));
                assert_eq!(find(&entries, 1, 0).edx & LEAF1_EDX_HTT, LEAF1_EDX_HTT);
                for function in [0xb, 0x1f] {
                    let (thread, core) = (find(&entries, function, 0), find(&entries, function, 1));
                    assert_eq!((thread.eax, thread.ebx, thread.ecx, thread.edx), (1, 2, 0x100, id.into()));
                    assert_eq!(
                        (1 << core.eax, core.ebx, core.ecx, core.edx),
                        (addressable, count.into(), 0x201, id.into())
                    );
                }
                let first_level = find(&entries, 4, 0).eax;
                assert_eq!(first_level >> 14 & 0xfff, 1, "L1 is shared by two threads");
                assert_eq!(first_level >> 26, addressable / 2 - 1, "half as many cores as threads");
                assert_eq!(find(&entries, 4, 3).eax >> 14 & 0xfff, addressable - 1);
                let extended = find(&entries, 0x8000_001e, 0);
                assert_eq!((extended.eax, extended.ebx), (id.into(), u32::from(id / 2) | 1 << 8));
                assert_eq!(find(&entries, 0x8000_001d, 0).eax >> 14 & 0xfff, 1);
                let package = find(&entries, 0x8000_0008, 0).ecx;
                assert_eq!((package & 0xff, 1 << (package >> 12 & 0xf)), (u32::from(count) - 1, addressable));
            }
        }
    }

    fn change(leaf: u32, subleaf: u32, registers: &[(CpuidRegister, &str)]) -> CpuidChange {
        let bits = |text| crate::config::BitChange::parse(text, 32).unwrap();
        let registers = registers.iter().map(|(register, text)| (*register, bits(text))).collect();
        CpuidChange { leaf, subleaf, flags: 1, registers }
    }

    #[test]
    fn a_user_changes_what_kvm_has_and_the_topology_stays_ours() {
        let mut host = host();
        let all_clear = format!("0b{}", "0".repeat(32));
        let registers =
            [(CpuidRegister::Eax, "0b0"), (CpuidRegister::Ecx, "0b0x1"), (CpuidRegister::Edx, all_clear.as_str())];
        host.change(&change(4, 3, &registers)).unwrap();
        host.change(&change(4, 3, &[(CpuidRegister::Ebx, "0b0xxx")])).unwrap();
        host.change(&change(1, 0, &[(CpuidRegister::Ebx, &all_clear)])).unwrap();
        let entries = host.shape(3, cores(4));
        let cache = find(&entries, 4, 3);
        assert_eq!((cache.flags, cache.ebx, cache.ecx, cache.edx), (1, !8, !4, 0));
        assert_eq!(cache.eax & 1, 0);
        assert_eq!(find(&entries, 1, 0).ebx >> 24, 3, "each vCPU has an APIC ID of its own");
        let unknown = host.change(&change(4, 9, &[])).unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "the CPU configuration changes CPUID leaf 0x4, subleaf 0x9, which KVM does not have here"
        );
    }

    #[test]
    fn amd_guests_hear_of_threads_on_a_host_that_has_none() {
        let mut host = host();
        host.entries.retain(|entry| ![CACHES, CORE].contains(&entry.function));
        host.entries.push(kvm_cpuid_entry2 { eax: 0x8000_000a, ..leaf(0x8000_0000, 0) });
        host.entries.iter_mut().filter(|e| e.function == 0x8000_0001).for_each(|e| e.ecx = 0);
        let entries = host.shape(3, Topology { cpus: 4, threads_per_core: 2 });
        assert_eq!(find(&entries, 0x8000_0000, 0).eax, CORE);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx, EXT1_ECX_TOPOEXT | EXT1_ECX_CMP_LEGACY);
        assert_eq!(find(&entries, CACHES, 0).eax, 0, "the list of caches is empty");
        assert_eq!((find(&entries, CORE, 0).eax, find(&entries, CORE, 0).ebx), (3, 1 | 1 << 8));
        let entries = host.shape(3, cores(4));
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx, EXT1_ECX_CMP_LEGACY, "nothing is told where there is nothing");
        assert!(entries.iter().all(|entry| entry.function != CORE));
    }

    #[test]
    fn what_intel_reserves_stays_as_it_is() {
        let mut host = host();
        host.entries[0].ebx = u32::from_le_bytes(*b"Genu");
        host.entries.iter_mut().filter(|e| e.function >= 0x8000_0000).for_each(|e| e.ecx = 0);
        let entries = host.shape(1, cores(4));
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx, 0);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn caches_are_shared_by_level() {
        let entries = host().shape(0, cores(4));
        assert_eq!(find(&entries, 4, 0).eax >> 14 & 0xfff, 0, "L1 is the core's own");
        assert_eq!(find(&entries, 4, 3).eax >> 14 & 0xfff, 3, "L3 is shared by four");
        assert_eq!(find(&entries, 4, 3).eax >> 26, 3);
        assert_eq!(find(&entries, 4, 4).eax, 0, "the end of the list stays one");
    }

    #[test]
    fn no_topology_leaf_beyond_what_the_host_has() {
        let host = HostCpuid { entries: vec![leaf(1, 0), leaf(0xb, 0)], tsc_deadline: false };
        let entries = host.shape(1, cores(2));
        assert!(entries.iter().all(|e| e.function != 0x1f));
        assert_eq!(find(&entries, 1, 0).ecx & LEAF1_ECX_TSC_DEADLINE, 0);
    }
}
