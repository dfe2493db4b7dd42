//! Sizes and addresses as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ConfigError;

/// A number of bytes; written with a binary suffix: `512M` is 512 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

const SUFFIXES: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for MemorySize {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Size(text.to_owned());
        // `512M`, `512MB` and `512MiB` all mean the same; so does any case.
        let upper = text.to_ascii_uppercase();
        let digits = upper.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &upper[digits.len()..] {
            "" => 0,
            suffix => {
                let (letter, rest) = suffix.split_at(1);
                if !["", "B", "IB"].contains(&rest) {
                    return Err(wrong());
                }
                SUFFIXES.iter().find(|(c, _)| letter.starts_with(*c)).ok_or_else(wrong)?.1
            }
        };
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl MemorySize {
    /// In whole MiB, which are easier to read.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self(self.0.saturating_add((1 << 20) - 1) & !((1 << 20) - 1))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SUFFIXES.iter().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift)) {
            Some((letter, shift)) => write!(f, "{}{letter}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl FromStr for MacAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| (1..=2).contains(&p.len()) && !p.starts_with('+')).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 {
            return Err(ConfigError::MulticastMac(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// In files they are written as people write them.
macro_rules! as_text {
    ($($unit:ty),*) => {
        $(impl Serialize for $unit {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $unit {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        })*
    };
}

as_text!(MemorySize, MacAddress);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("2g", 2 << 30), ("1KiB", 1024), ("3tb", 3 << 40)]
        {
            assert_eq!(text.parse(), Ok(MemorySize(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "+1", "1.5G", "1 G", "1X", "1MM", "99999999999G", "1Mi", "ä"] {
            assert!(text.parse::<MemorySize>().is_err(), "{text}");
        }
    }

    #[test]
    fn multicast_is_no_address_of_a_card() {
        assert!(matches!("01:00:5e:00:00:01".parse::<MacAddress>(), Err(ConfigError::MulticastMac(_))));
        for text in ["", "1:2:3:4:5", "2:2:3:4:5:6:7", "02:00:00:00:00:0g", "02:00:00:00:00:+1", "002:0:0:0:0:0"] {
            assert!(matches!(text.parse::<MacAddress>(), Err(ConfigError::Mac(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn sizes_round_trip(bytes: u64) {
            prop_assert_eq!(MemorySize(bytes).to_string().parse(), Ok(MemorySize(bytes)));
        }

        #[test]
        fn macs_round_trip(mut bytes: [u8; 6]) {
            bytes[0] &= !1;
            prop_assert_eq!(MacAddress(bytes).to_string().parse(), Ok(MacAddress(bytes)));
        }

        #[test]
        fn nothing_panics(text: String) {
            let _ = (text.parse::<MemorySize>(), text.parse::<MacAddress>());
        }
    }
}
