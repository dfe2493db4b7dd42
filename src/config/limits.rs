//! How much a device may do.

use serde::{Deserialize, Serialize};

use super::{ConfigError, MemorySize};

/// A budget of tokens (bytes or operations) that what is done takes from, and that time fills again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens in a full bucket, which it is at first. With none, there is no limit.
    pub size: u64,
    /// Milliseconds in which an empty bucket fills, evenly. With none, there is no limit.
    pub refill_ms: u64,
    /// More tokens, once: they are used up before any others.
    #[serde(default)]
    pub burst: u64,
}

impl TokenBucket {
    /// Is it none?
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        self.size == 0 || self.refill_ms == 0
    }

    /// `BYTES[/MS][+BURST]`, with the units of a [`MemorySize`]; `key` is the option's name.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn of_bytes(key: &'static str, text: &str) -> Result<Self, ConfigError> {
        let takes = "BYTES[/MS][+BURST], such as 100M for 100 MiB in each second, or 100M/500+1G";
        Self::parse(text, |bytes| bytes.parse().ok().map(|MemorySize(bytes)| bytes))
            .ok_or_else(|| ConfigError::OptionValue { key, value: text.into(), takes })
    }

    /// `N[/MS][+BURST]`; `key` is the option's name.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn of_operations(key: &'static str, text: &str) -> Result<Self, ConfigError> {
        let takes = "N[/MS][+BURST], such as 1000 in each second, or 1000/500+5000";
        Self::parse(text, number).ok_or_else(|| ConfigError::OptionValue { key, value: text.into(), takes })
    }

    /// A size or a time of 0 is no limit, and so does not look like one.
    fn parse(text: &str, tokens: impl Fn(&str) -> Option<u64>) -> Option<Self> {
        let (rate, burst) = match text.split_once('+') {
            Some((rate, burst)) => (rate, tokens(burst)?),
            None => (text, 0),
        };
        let (size, refill_ms) = match rate.split_once('/') {
            Some((size, refill_ms)) => (tokens(size)?, number(refill_ms)?),
            None => (tokens(rate)?, 1000),
        };
        Some(Self { size, refill_ms, burst }).filter(|bucket| !bucket.is_unlimited())
    }
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|_| !text.starts_with('+'))
}

/// The limits of a device, or of one direction of it. As a change of them, what is absent stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RateLimits {
    /// In bytes of data.
    pub bandwidth: Option<TokenBucket>,
    /// In requests, or frames.
    pub operations: Option<TokenBucket>,
}

impl RateLimits {
    /// Is there no limit?
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        [self.bandwidth, self.operations].iter().flatten().all(TokenBucket::is_unlimited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_as_people_write_them() {
        let bucket = |size, refill_ms, burst| Ok(TokenBucket { size, refill_ms, burst });
        for (text, expected) in [
            ("1", bucket(1, 1000, 0)),
            ("100M", bucket(100 << 20, 1000, 0)),
            ("4k/1", bucket(4096, 1, 0)),
            ("100M/500+1G", bucket(100 << 20, 500, 1 << 30)),
            ("1+0", bucket(1, 1000, 0)),
        ] {
            assert_eq!(TokenBucket::of_bytes("bandwidth", text), expected, "{text}");
        }
        assert_eq!(TokenBucket::of_operations("ops", "1000/100+20"), bucket(1000, 100, 20));
        let wrong =
            ["", "0", "1/0", "0/1000", "-1", "1/", "1+", "+1", "1/+1", "1++1", "1+1/1", "1/2/3", "1/1K", "1/s", "1.5"];
        for text in wrong.into_iter().chain(["1K", "1/1+1K"]) {
            let error = TokenBucket::of_operations("ops", text);
            assert!(matches!(error, Err(ConfigError::OptionValue { key: "ops", .. })), "{text}: {error:?}");
        }
        for text in wrong {
            let error = TokenBucket::of_bytes("rx-bandwidth", text);
            assert!(matches!(error, Err(ConfigError::OptionValue { key: "rx-bandwidth", .. })), "{text}: {error:?}");
        }
    }

    #[test]
    fn a_bucket_without_a_size_or_a_time_is_no_limit() {
        let bucket = |size, refill_ms| Some(TokenBucket { size, refill_ms, burst: 1 });
        for (bandwidth, operations, unlimited) in [
            (None, None, true),
            (bucket(0, 1), bucket(1, 0), true),
            (bucket(1, 1), None, false),
            (bucket(0, 1), bucket(1, 1), false),
        ] {
            assert_eq!(RateLimits { bandwidth, operations }.is_unlimited(), unlimited);
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text: String) {
            let _ = (TokenBucket::of_bytes("bandwidth", &text), TokenBucket::of_operations("ops", &text));
        }

        #[test]
        fn what_is_written_is_meant(size in 1u64.., refill_ms in 1u64.., burst: u64) {
            let expected = TokenBucket { size, refill_ms, burst };
            let text = format!("{size}/{refill_ms}+{burst}");
            prop_assert_eq!(TokenBucket::of_bytes("bandwidth", &text), Ok(expected));
            prop_assert_eq!(TokenBucket::of_operations("ops", &text), Ok(expected));
        }
    }
}
