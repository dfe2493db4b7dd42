//! A token bucket: pure arithmetic in integers, which knows of time what it is told.

use std::time::Duration;

use super::Wait;
use crate::config::TokenBucket;

/// Longer ones, of 292 million years, are cut, so that a full bucket and a debt of any length fit into 128 bits.
const MAX_REFILL_MS: u64 = u64::MAX / 2;

/// The state of a [`TokenBucket`] that is a limit.
///
/// A request passes as soon as one whole token is there, however many it takes: what it takes beyond that is a debt,
/// which has to be paid before the next one passes. So a request larger than the bucket needs no rule of its own, and
/// a small one has no advantage over a large one that waits too.
#[derive(Debug, Clone)]
pub struct Bucket {
    config: TokenBucket,
    /// As configured, up to [`MAX_REFILL_MS`].
    refill_ms: u64,
    /// What is left of it.
    burst: u64,
    /// What the bucket lacks to be full, in parts of a token: as many as there are milliseconds in `refill_ms` make one,
    /// so that a millisecond brings a whole number of them, `size`. Nothing is ever rounded.
    missing: u128,
    /// The time up to which it has been filled, in milliseconds.
    filled_at: u64,
}

impl Bucket {
    /// A full one; `None` if that is no limit.
    pub fn new(config: TokenBucket, now: u64) -> Option<Self> {
        let refill_ms = config.refill_ms.min(MAX_REFILL_MS);
        let bucket = Self { config, refill_ms, burst: config.burst, missing: 0, filled_at: now };
        (!config.is_unlimited()).then_some(bucket)
    }

    pub fn config(&self) -> TokenBucket {
        self.config
    }

    /// May a request pass at this time? A time before one that it has been told already counts as that one.
    pub fn check(&mut self, now: u64) -> Result<(), Wait> {
        let elapsed = now.saturating_sub(self.filled_at);
        self.filled_at += elapsed;
        self.missing = self.missing.saturating_sub(product(elapsed, self.config.size));
        if self.burst > 0 {
            return Ok(());
        }
        // With one token in it.
        let most = product(self.config.size - 1, self.refill_ms);
        match self.missing.saturating_sub(most).div_ceil(self.config.size.into()) {
            0 => Ok(()),
            ms => Err(Wait(Duration::from_millis(ms.try_into().unwrap_or(u64::MAX)))),
        }
    }

    /// Takes the tokens of a request that passes, those of the burst first.
    pub fn charge(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        // It fits, unless there were many without a check.
        self.missing = self.missing.saturating_add(product(tokens - from_burst, self.refill_ms));
    }
}

fn product(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, refill_ms: u64, burst: u64) -> Bucket {
        Bucket::new(TokenBucket { size, refill_ms, burst }, 0).unwrap()
    }

    impl Bucket {
        fn take(&mut self, now: u64, tokens: u64) -> Result<(), Wait> {
            self.check(now)?;
            self.charge(tokens);
            Ok(())
        }
    }

    fn wait(ms: u64) -> Result<(), Wait> {
        Err(Wait(Duration::from_millis(ms)))
    }

    #[test]
    fn a_full_bucket_empties_and_fills_evenly() {
        let mut bucket = bucket(4, 1000, 0);
        for _ in 0..4 {
            assert_eq!(bucket.take(0, 1), Ok(()));
        }
        assert_eq!(bucket.take(0, 1), wait(250));
        assert_eq!(bucket.take(249, 1), wait(1));
        assert_eq!(bucket.take(250, 1), Ok(()));
        assert_eq!(bucket.take(250, 1), wait(250));
        // It does not fill over its rim.
        assert_eq!(bucket.take(1_000_000, 4), Ok(()));
        assert_eq!(bucket.take(1_000_000, 1), wait(250));
    }

    #[test]
    fn fractions_of_tokens_are_kept() {
        let mut bucket = bucket(3, 10, 0);
        assert_eq!(bucket.take(0, 3), Ok(()));
        // Asked each millisecond, it gives as much as asked once.
        let taken = (1..=1000).filter(|&now| bucket.take(now, 1).is_ok()).count();
        assert_eq!(taken, 300);
    }

    #[test]
    fn the_burst_comes_first_and_once() {
        let mut bucket = bucket(10, 1000, 5);
        assert_eq!(bucket.take(0, 4), Ok(()));
        assert_eq!(bucket.take(5000, 4), Ok(()));
        // One of the burst, three of the bucket: seven are left.
        for _ in 0..7 {
            assert_eq!(bucket.take(5000, 1), Ok(()));
        }
        assert_eq!(bucket.take(5000, 1), wait(100));
        assert_eq!(bucket.take(9_999_999, 10), Ok(()));
        assert_eq!(bucket.take(9_999_999, 1), wait(100), "the burst does not come back");
    }

    #[test]
    fn what_is_larger_than_the_bucket_is_paid_for_later() {
        let mut bucket = bucket(10, 1000, 0);
        assert_eq!(bucket.take(0, 35), Ok(()));
        assert_eq!(bucket.take(0, 1), wait(2600));
        assert_eq!(bucket.take(2600, 35), Ok(()));
        assert_eq!(bucket.take(2600, 1), wait(3500));
    }

    #[test]
    fn time_that_stands_still_or_goes_back_brings_nothing() {
        let mut bucket = bucket(1, 1000, 0);
        assert_eq!(bucket.take(5000, 1), Ok(()));
        for now in [5000, 0, 4999, 5000] {
            assert_eq!(bucket.take(now, 1), wait(1000));
        }
        assert_eq!(bucket.take(6000, 1), Ok(()));
    }

    #[test]
    fn the_largest_numbers_do_no_harm() {
        for size in [1, u64::MAX] {
            for refill_ms in [1, u64::MAX] {
                for burst in [0, 1, u64::MAX] {
                    let mut bucket = bucket(size, refill_ms, burst);
                    for now in [0, 1, u64::MAX, 0] {
                        for tokens in [0, 1, u64::MAX] {
                            let _ = bucket.take(now, tokens);
                        }
                    }
                    bucket.charge(u64::MAX);
                    bucket.charge(u64::MAX);
                    assert_ne!(bucket.check(0), Ok(()));
                }
            }
        }
        assert!(Bucket::new(TokenBucket { size: 0, refill_ms: 1, burst: 9 }, 0).is_none());
        assert!(Bucket::new(TokenBucket { size: 1, refill_ms: 0, burst: 9 }, 0).is_none());
    }

    /// Numbers of any magnitude.
    fn number() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0u32..64).prop_map(|(n, shift)| n >> shift)
    }

    #[derive(Debug, Clone, Copy)]
    struct Step {
        pause: u64,
        tokens: u64,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let any_step = (number(), number()).prop_map(|(pause, tokens)| Step { pause, tokens });
        let near_step = (0u64..50, 0u64..50).prop_map(|(pause, tokens)| Step { pause, tokens });
        prop_oneof![proptest::collection::vec(any_step, 0..100), proptest::collection::vec(near_step, 0..300),]
    }

    fn configs() -> impl Strategy<Value = TokenBucket> {
        let any = (number(), number(), number());
        let near = (0u64..50, 0u64..200, 0u64..100);
        prop_oneof![any, near].prop_map(|(size, refill_ms, burst)| TokenBucket {
            size: size.max(1),
            refill_ms: refill_ms.clamp(1, MAX_REFILL_MS),
            burst,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// From any moment on: what the bucket held, its burst, what time has brought, and the last request's rest.
        #[test]
        fn no_more_passes_than_time_allows(config in configs(), steps in steps()) {
            let mut bucket = Bucket::new(config, 0).unwrap();
            let (mut now, mut passed) = (0u64, 0u128);
            let brought = |ms: u64| u128::from(config.size) * u128::from(ms) / u128::from(config.refill_ms);
            for Step { pause, tokens } in steps {
                now = now.saturating_add(pause);
                if bucket.take(now, tokens).is_ok() {
                    // All before the last one were within the limit.
                    let limit = u128::from(config.size) + u128::from(config.burst) + brought(now);
                    prop_assert!(passed < limit, "{passed} of {limit} had passed");
                    passed += u128::from(tokens);
                }
            }
        }

        /// Who waits as long as he is told passes, and not a millisecond sooner.
        #[test]
        fn a_wait_is_just_long_enough(config in configs(), steps in steps()) {
            let mut bucket = Bucket::new(config, 0).unwrap();
            let mut now = 0u64;
            for Step { pause, tokens } in steps {
                now = now.saturating_add(pause);
                let Err(Wait(wait)) = bucket.take(now, tokens) else { continue };
                let wait = u64::try_from(wait.as_millis()).unwrap();
                prop_assert!(wait > 0);
                let Some(due) = now.checked_add(wait).filter(|_| wait < u64::MAX) else { continue };
                prop_assert_eq!(bucket.clone().check(due - 1), Err(Wait(Duration::from_millis(1))));
                prop_assert_eq!(bucket.clone().check(due), Ok(()));
            }
        }

        /// To the part of a token: what has passed is what was there and what time has brought, less what is there.
        #[test]
        fn nothing_is_lost(size in 1u64..1000, refill_ms in 1u64..1000, burst in 0u64..1000, tokens in 1u64..3000) {
            let mut bucket = bucket(size, refill_ms, burst);
            let (mut now, mut passed) = (0, 0);
            // Nobody waits longer than he has to, so that the bucket is never full for a while.
            for _ in 0..300 {
                match bucket.take(now, tokens) {
                    Ok(()) => passed += tokens,
                    Err(Wait(wait)) => now += wait.as_millis() as u64,
                }
            }
            let _ = bucket.check(now);
            let from_bucket = passed - (burst - bucket.burst);
            prop_assert_eq!(bucket.missing + product(size, now), product(from_bucket, refill_ms));
        }

        /// How often one looks makes no difference.
        #[test]
        fn looking_changes_nothing(config in configs(), steps in steps()) {
            let (mut watched, mut left_alone) = (Bucket::new(config, 0).unwrap(), Bucket::new(config, 0).unwrap());
            let mut now = 0u64;
            for Step { pause, tokens } in steps {
                for part in 0..4 {
                    let _ = watched.check(now.saturating_add(pause / 4 * part));
                }
                now = now.saturating_add(pause);
                prop_assert_eq!(watched.take(now, tokens), left_alone.take(now, tokens));
            }
        }
    }
}
