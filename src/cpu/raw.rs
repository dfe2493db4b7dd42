//! KVM's structs in a file: their bytes in hexadecimal, without the zeroes at the end.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A struct of KVM's, kept as it is. One that is shorter in a file than here has zeroes at its end; a longer one is
/// refused.
#[derive(Clone, Copy, Default)]
pub struct Raw<T>(pub T);

/// Bytes of any number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RawBytes(pub Vec<u8>);

impl<T> fmt::Debug for Raw<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", size_of::<T>())
    }
}

impl<T: IntoBytes + Immutable> PartialEq for Raw<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut bytes = deserializer.deserialize_str(Hex { most: size_of::<T>() })?;
        bytes.resize(size_of::<T>(), 0);
        // It is as long as it has to be, and any bytes will do.
        T::read_from_bytes(&bytes).map(Self).map_err(|_| D::Error::custom("bytes of another size"))
    }
}

impl Serialize for RawBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for RawBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Hex { most: usize::MAX }).map(Self)
    }
}

fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let len = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let mut text = String::with_capacity(2 * len);
    for byte in &bytes[..len] {
        text.push(DIGITS[usize::from(byte >> 4)].into());
        text.push(DIGITS[usize::from(byte & 0xf)].into());
    }
    text
}

struct Hex {
    most: usize,
}

impl Visitor<'_> for Hex {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes in hexadecimal")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
        if text.len() / 2 > self.most {
            return Err(E::custom(format_args!("{} bytes where there are {} at most", text.len() / 2, self.most)));
        }
        let digit = |digit: u8| (digit as char).to_digit(16).filter(|_| !digit.is_ascii_uppercase());
        let byte = |pair: &[u8]| match pair {
            &[high, low] => Some((digit(high)? << 4 | digit(low)?) as u8),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes.ok_or_else(|| E::custom("not bytes in hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_regs;
    use proptest::prelude::*;

    #[test]
    fn zeroes_at_the_end_take_no_space() {
        let regs = Raw(kvm_regs { rax: 0xab01, ..Default::default() });
        let text = serde_json::to_string(&regs).unwrap();
        assert_eq!(text, "\"01ab\"");
        assert_eq!(serde_json::from_str::<Raw<kvm_regs>>(&text).unwrap(), regs);
    }

    #[test]
    fn odd_text_is_refused() {
        let long = format!("\"{}\"", "0".repeat(2 * size_of::<kvm_regs>() + 2));
        for bad in ["\"1\"", "\"1g\"", "\"AB\"", "\"+1\"", "\"ä\"", "12", "null", &long] {
            assert!(serde_json::from_str::<Raw<kvm_regs>>(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes: Vec<u8>) {
            let text = serde_json::to_string(&RawBytes(bytes.clone())).unwrap();
            let mut back = serde_json::from_str::<RawBytes>(&text).unwrap().0;
            prop_assert!(back.last() != Some(&0));
            back.resize(bytes.len(), 0);
            prop_assert_eq!(back, bytes);
        }
    }
}
