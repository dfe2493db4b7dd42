//! What a VM's CPUs are to have otherwise than they would by themselves.

/// Changes of what KVM offers, and of what we demand of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuChanges {
    /// Numbers of KVM's capabilities that the VM cannot do without.
    pub required: Vec<u32>,
    /// Numbers of those that it can do without, whatever we think.
    pub dispensable: Vec<u32>,
    pub cpuid: Vec<CpuidChange>,
    pub msrs: Vec<MsrChange>,
}

/// A change of a leaf that KVM offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuidChange {
    pub leaf: u32,
    pub subleaf: u32,
    /// As in `struct kvm_cpuid_entry2`.
    pub flags: u32,
    pub registers: Vec<(CpuidRegister, BitChange)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of an MSR that KVM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrChange {
    pub index: u32,
    pub bits: BitChange,
}

/// Bits that are set, cleared, or left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitChange {
    /// Those that are not left alone.
    mask: u64,
    /// What those become; 0 elsewhere.
    value: u64,
}

impl BitChange {
    /// `0b` and up to `width` of `0`, `1` and `x` (leave alone), the highest bit first; bits that are not written are
    /// left alone, and `_` may stand anywhere between.
    #[must_use]
    pub fn parse(text: &str, width: usize) -> Option<Self> {
        let (mut change, mut count) = (Self { mask: 0, value: 0 }, 0);
        for digit in text.strip_prefix("0b")?.chars().filter(|&digit| digit != '_') {
            let (mask, value) = match digit {
                '0' => (1, 0),
                '1' => (1, 1),
                'x' => (0, 0),
                _ => return None,
            };
            change = Self { mask: change.mask << 1 | mask, value: change.value << 1 | value };
            count += 1;
        }
        (1..=width).contains(&count).then_some(change)
    }

    /// What becomes of a value.
    #[must_use]
    pub fn apply(self, old: u64) -> u64 {
        old & !self.mask | self.value
    }

    /// The same of 32 bits.
    #[must_use]
    pub fn apply_32(self, old: u32) -> u32 {
        self.apply(old.into()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_are_set_cleared_and_left_alone() {
        let change = BitChange::parse("0b10_xx", 32).unwrap();
        assert_eq!((change.apply(0), change.apply(0xff), change.apply_32(0b0111)), (8, 0xfb, 0b1011));
        for text in ["", "0b", "0b_", "10", "0x10", "0b2", "0b1 0", "0B1", "0b1ä", "-0b1"] {
            assert_eq!(BitChange::parse(text, 64), None, "{text}");
        }
        let all = format!("0b{}", "1".repeat(64));
        assert_eq!(BitChange::parse(&all, 64).unwrap().apply(0), u64::MAX);
        assert_eq!(BitChange::parse(&all, 63), None, "more bits than there are");
    }

    proptest! {
        #[test]
        fn each_digit_decides_its_bit(digits in "[01x]{1,64}", old: u64) {
            let new = BitChange::parse(&format!("0b{digits}"), 64).unwrap().apply(old);
            for bit in 0..64 {
                let expected = match digits.chars().rev().nth(bit) {
                    Some('0') => 0,
                    Some('1') => 1,
                    _ => old >> bit & 1,
                };
                prop_assert_eq!(new >> bit & 1, expected);
            }
        }

        #[test]
        fn nothing_panics(text in "(0b)?\\PC{0,80}", width in 0usize..100) {
            let _ = BitChange::parse(&text, width);
        }
    }
}
