//! What a saved guest may be using of a CPU, by the names Linux has for it, and whether a host has it too.

use kvm_bindings::kvm_cpuid_entry2;
use thiserror::Error;

/// Why a guest cannot go on here: the host's CPU lacks what the guest has seen.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Incompatible {
    #[error("it ran on a CPU of {saved}, and this host's is of {here}")]
    Vendor { saved: String, here: String },
    #[error("this host's CPU, or its KVM, lacks what it may be using: {}", .0.join(", "))]
    Features(Vec<String>),
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register of CPUID whose bits are features. (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.)
struct FeatureWord {
    leaf: u32,
    index: u32,
    register: Register,
    /// By bit; `-` for one without a name.
    names: &'static str,
    /// Bits that say nothing of the host: what a guest has turned on, and what we say ourselves.
    not_of_host: u32,
}

use Register::{Eax, Ebx, Ecx, Edx};

const WORDS: [FeatureWord; 11] = [
    word(
        (1, 0, Edx),
        1 << 28,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse \
         sse2 ss ht tm ia64 pbe",
    ),
    word(
        (1, 0, Ecx),
        1 << 31 | 1 << 27 | 1 << 24,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    word(
        (7, 0, Ebx),
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed \
         adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    word(
        (7, 0, Ecx),
        1 << 4,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
         enqcmd - -",
    ),
    word(
        (7, 0, Edx),
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect - md_clear - - - serialize - tsxldtrk - \
         pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities \
         core_capabilities ssbd",
    ),
    word(
        (7, 1, Eax),
        0,
        "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - - - - - amx_fp16 - avx_ifma - - lam",
    ),
    word((0xd, 0, Eax), 0, "x87-state sse-state avx-state - - opmask-state zmm-state hi-zmm-state - pkru-state"),
    word((0xd, 1, Eax), 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        (0x8000_0001, 0, Edx),
        // The same as in leaf 1.
        0x0183_f3ff,
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(
        (0x8000_0001, 0, Ecx),
        1 << 22 | 1 << 1,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    word(
        (0x8000_0008, 0, Ebx),
        0,
        "clzero irperf xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs stibp - - - - - - - - ssbd virt_ssbd",
    ),
];

const fn word((leaf, index, register): (u32, u32, Register), not_of_host: u32, names: &'static str) -> FeatureWord {
    FeatureWord { leaf, index, register, names, not_of_host }
}

impl FeatureWord {
    fn bits(&self, cpuid: &[kvm_cpuid_entry2]) -> u32 {
        let entry = cpuid.iter().find(|entry| (entry.function, entry.index) == (self.leaf, self.index));
        let value = entry.map_or(0, |entry| match self.register {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        });
        value & !self.not_of_host
    }

    fn name(&self, bit: u32) -> String {
        match self.names.split_whitespace().nth(bit as usize).filter(|name| *name != "-") {
            Some(name) => name.to_owned(),
            None => {
                let register = match self.register {
                    Eax => "EAX",
                    Ebx => "EBX",
                    Ecx => "ECX",
                    Edx => "EDX",
                };
                format!("bit {bit} of {register} of CPUID leaf {:#x}.{}", self.leaf, self.index)
            }
        }
    }

    fn names_of(&self, bits: u32) -> impl Iterator<Item = String> {
        (0..32).filter(move |bit| bits & 1 << bit != 0).map(|bit| self.name(bit))
    }
}

/// Who made the CPU, such as `AuthenticAMD`.
pub fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let entry = cpuid.iter().find(|entry| entry.function == 0).copied().unwrap_or_default();
    let bytes: Vec<u8> = [entry.ebx, entry.edx, entry.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.escape_ascii().to_string()
}

/// All features that a guest with this CPUID may be using.
pub fn features(cpuid: &[kvm_cpuid_entry2]) -> Vec<String> {
    WORDS.iter().flat_map(|word| word.names_of(word.bits(cpuid))).collect()
}

/// Checks that a host has what a guest with a saved CPUID may be using.
pub fn check(saved: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Result<(), Incompatible> {
    let (saved_vendor, here) = (vendor(saved), vendor(host));
    if saved_vendor != here {
        return Err(Incompatible::Vendor { saved: saved_vendor, here });
    }
    let missing: Vec<_> = WORDS.iter().flat_map(|word| word.names_of(word.bits(saved) & !word.bits(host))).collect();
    if missing.is_empty() { Ok(()) } else { Err(Incompatible::Features(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid(vendor: [u8; 12], avx2: bool) -> Vec<kvm_cpuid_entry2> {
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        let leaf0 = kvm_cpuid_entry2 { ebx: word(0), edx: word(4), ecx: word(8), ..Default::default() };
        let leaf1 = kvm_cpuid_entry2 { function: 1, ecx: 1 << 31 | 1 << 27 | 1, ..Default::default() };
        let leaf7 = kvm_cpuid_entry2 { function: 7, ebx: u32::from(avx2) << 5 | 1 << 6, ..Default::default() };
        vec![leaf0, leaf1, leaf7]
    }

    #[test]
    fn what_is_missing_is_named() {
        let (saved, mut host) = (cpuid(*b"AuthenticAMD", true), cpuid(*b"AuthenticAMD", false));
        assert_eq!(
            check(&saved, &host).unwrap_err().to_string(),
            "this host's CPU, or its KVM, lacks what it may be using: avx2"
        );
        assert_eq!(check(&host, &saved), Ok(()));
        // What the guest turns on, and what we say ourselves.
        host[1].ecx = 1;
        host[2].ebx = 1 << 5;
        assert_eq!(check(&saved, &host), Err(Incompatible::Features(vec!["bit 6 of EBX of CPUID leaf 0x7.0".into()])));
    }

    #[test]
    fn another_vendor_is_another_machine() {
        let (saved, host) = (cpuid(*b"AuthenticAMD", true), cpuid(*b"GenuineIntel", true));
        let error = check(&saved, &host).unwrap_err().to_string();
        assert_eq!(error, "it ran on a CPU of AuthenticAMD, and this host's is of GenuineIntel");
        assert_eq!(vendor(&[]), "\\x00".repeat(12));
    }

    #[test]
    fn every_word_has_a_name_for_each_bit_at_most() {
        for word in WORDS {
            assert!(word.names.split_whitespace().count() <= 32, "{:#x}.{}", word.leaf, word.index);
        }
        assert_eq!(features(&cpuid(*b"GenuineIntel", true)), ["pni", "avx2", "bit 6 of EBX of CPUID leaf 0x7.0"]);
    }
}
