//! What the guest's CPUs have: capabilities of KVM, CPUID, MSRs.

use serde::{Deserialize, Serialize};

use super::InvalidValue;
use crate::config::{BitChange, CpuChanges, CpuidChange, CpuidRegister, MsrChange};

/// A model of Firecracker's own, which is deprecated there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Numbers of capabilities that are needed; with `!`, that are not.
    #[serde(default)]
    pub kvm_capabilities: Vec<String>,
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// `leaf` and `subleaf` are numbers as text: `0x..`, `0b..` or decimal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    pub leaf: String,
    pub subleaf: String,
    pub flags: u32,
    pub modifiers: Vec<RegisterModifier>,
}

/// A bitmap is `0b` and up to 32 of `0`, `1`, `x` (leave alone) and `_`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    pub register: CpuidRegister,
    pub bitmap: String,
}

/// As a register's, with up to 64 bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    pub addr: String,
    pub bitmap: String,
}

impl CpuConfig {
    /// What it asks for.
    pub fn changes(&self) -> Result<CpuChanges, InvalidValue> {
        let mut changes = CpuChanges::default();
        for text in &self.kvm_capabilities {
            let (digits, list) = match text.strip_prefix('!') {
                Some(digits) => (digits, &mut changes.dispensable),
                None => (text.as_str(), &mut changes.required),
            };
            let decimal = digits.bytes().all(|digit| digit.is_ascii_digit());
            match digits.parse() {
                Ok(number) if decimal => list.push(number),
                _ => return Err(InvalidValue::Capability(text.clone())),
            }
        }
        for modifier in &self.cpuid_modifiers {
            let registers = modifier.modifiers.iter().map(|change| Ok((change.register, bitmap(&change.bitmap, 32)?)));
            changes.cpuid.push(CpuidChange {
                leaf: number(&modifier.leaf)?,
                subleaf: number(&modifier.subleaf)?,
                flags: modifier.flags,
                registers: registers.collect::<Result<_, InvalidValue>>()?,
            });
        }
        for modifier in &self.msr_modifiers {
            changes.msrs.push(MsrChange { index: number(&modifier.addr)?, bits: bitmap(&modifier.bitmap, 64)? });
        }
        Ok(changes)
    }

    pub fn check(&self) -> Result<(), InvalidValue> {
        self.changes().map(drop)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn number(text: &str) -> Result<u32, InvalidValue> {
    let (digits, radix) = match text.split_at_checked(2) {
        Some(("0x", digits)) => (digits, 16),
        Some(("0b", digits)) => (digits, 2),
        _ => (text, 10),
    };
    match u32::from_str_radix(digits, radix) {
        Ok(number) if !digits.starts_with('+') => Ok(number),
        _ => Err(InvalidValue::Number(text.into())),
    }
}

fn bitmap(text: &str, width: usize) -> Result<BitChange, InvalidValue> {
    BitChange::parse(text, width).ok_or_else(|| InvalidValue::Bitmap { text: text.into(), width })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_says_what_to_change() {
        let text = r#"{"kvm_capabilities":["1","!56"],
            "cpuid_modifiers":[{"leaf":"0x80000008","subleaf":"0b1","flags":1,
                "modifiers":[{"register":"ecx","bitmap":"0b1x0"}]}],
            "msr_modifiers":[{"addr":"416","bitmap":"0b1"}]}"#;
        let changes = serde_json::from_str::<CpuConfig>(text).unwrap().changes().unwrap();
        let bits = |text| BitChange::parse(text, 64).unwrap();
        let expected = CpuChanges {
            required: vec![1],
            dispensable: vec![56],
            cpuid: vec![CpuidChange {
                leaf: 0x8000_0008,
                subleaf: 1,
                flags: 1,
                registers: vec![(CpuidRegister::Ecx, bits("0b1x0"))],
            }],
            msrs: vec![MsrChange { index: 0x1a0, bits: bits("0b1") }],
        };
        assert_eq!(changes, expected);
    }

    #[test]
    fn what_is_no_number() {
        for text in ["", "0x", "0b", "x", "-1", "+1", "0x+1", "0x100000000", "4294967296", "0b2", "1_0", "ä"] {
            assert_eq!(number(text), Err(InvalidValue::Number(text.into())));
        }
        assert_eq!(number("0xFfffffff"), Ok(u32::MAX));
    }
}
