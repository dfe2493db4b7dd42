//! The rate limiter of a device, or of one direction of it.
//!
//! A device asks it before each request. What has to wait stays where it is, in its ring or in the host's tap, and the
//! device's thread comes back to it in time, or when the limits change: see [`crate::devices::worker`].

mod bucket;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use self::bucket::Bucket;
use crate::config::{RateLimits, TokenBucket};
use crate::observe::Traffic;

/// A request cannot pass before so much time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait(pub Duration);

/// Shared by all queues that it limits, and by whoever may change the limits while they run.
///
/// While there are no limits, asking costs a look at a flag.
#[derive(Debug)]
pub struct Limiter {
    limited: AtomicBool,
    /// It sees every request, and so it counts them.
    pub traffic: Traffic,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    buckets: Buckets,
    /// What passes has to pass there too.
    budget: Option<Arc<Budget>>,
    /// Of the threads that may wait.
    bells: Vec<Arc<EventFd>>,
}

/// What several limiters together let pass at most.
///
/// Threads that ask at the same moment may all pass, each with one request: that is a debt as of any request.
#[derive(Debug)]
pub struct Budget(Mutex<Buckets>);

#[derive(Debug)]
struct Buckets {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
    /// When their time began.
    start: Instant,
}

impl Default for Limiter {
    /// Without limits.
    fn default() -> Self {
        let buckets = Buckets { bandwidth: None, operations: None, start: Instant::now() };
        let state = State { buckets, budget: None, bells: Vec::new() };
        Self { limited: AtomicBool::new(false), traffic: Traffic::default(), state: Mutex::new(state) }
    }
}

impl Budget {
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        let bucket = |config: Option<TokenBucket>| config.and_then(|config| Bucket::new(config, 0));
        let (bandwidth, operations) = (bucket(limits.bandwidth), bucket(limits.operations));
        Self(Mutex::new(Buckets { bandwidth, operations, start: Instant::now() }))
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Limiter {
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        let limiter = Self::default();
        limiter.update(limits);
        limiter
    }

    /// Replaces limits by new ones, whose buckets are full, or takes them away; what is absent stays as it is. It
    /// counts at once, also for what waits.
    pub fn update(&self, limits: RateLimits) {
        let mut state = self.lock();
        let buckets = &mut state.buckets;
        let now = buckets.now();
        if let Some(bandwidth) = limits.bandwidth {
            buckets.bandwidth = Bucket::new(bandwidth, now);
        }
        if let Some(operations) = limits.operations {
            buckets.operations = Bucket::new(operations, now);
        }
        self.heed(&state);
    }

    /// Has what passes here pass there too: a limit of several devices together.
    pub fn spend_from(&self, budget: Arc<Budget>) {
        let mut state = self.lock();
        state.budget = Some(budget);
        self.heed(&state);
    }

    fn heed(&self, state: &State) {
        let Buckets { bandwidth, operations, .. } = &state.buckets;
        let limited = bandwidth.is_some() || operations.is_some() || state.budget.is_some();
        self.limited.store(limited, Ordering::Relaxed);
        state.ring();
    }

    /// The limits that there are of its own.
    #[must_use]
    pub fn limits(&self) -> RateLimits {
        let Buckets { bandwidth, operations, .. } = &self.lock().buckets;
        let config = |bucket: &Option<Bucket>| bucket.as_ref().map(Bucket::config);
        RateLimits { bandwidth: config(bandwidth), operations: config(operations) }
    }

    /// Lets a request with so many bytes of data pass.
    ///
    /// # Errors
    /// How long it has to wait at least before it may ask again.
    pub fn take(&self, bytes: u64) -> Result<(), Wait> {
        if self.limited.load(Ordering::Relaxed) {
            let mut state = self.lock();
            // One without data does not ask for bandwidth.
            state.check(bytes > 0).inspect_err(|_| self.traffic.throttled.count())?;
            state.charge(bytes);
        }
        self.count(bytes);
        Ok(())
    }

    fn count(&self, bytes: u64) {
        self.traffic.operations.count();
        self.traffic.bytes.add(bytes);
    }

    /// Would a request with data pass? For one whose length is known only when it has begun: it is charged then.
    ///
    /// # Errors
    /// How long it has to wait at least.
    pub fn check(&self) -> Result<(), Wait> {
        if !self.limited.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.lock().check(true).inspect_err(|_| self.traffic.throttled.count())
    }

    /// Takes the tokens of a request that has passed [`Self::check`].
    pub fn charge(&self, bytes: u64) {
        if self.limited.load(Ordering::Relaxed) {
            self.lock().charge(bytes);
        }
        self.count(bytes);
    }

    /// Has a bell rung whenever the limits change.
    pub fn ring_on_change(&self, bell: Arc<EventFd>) {
        self.lock().bells.push(bell);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets time go by.
    #[cfg(test)]
    pub fn skip(&self, time: Duration) {
        let mut state = self.lock();
        state.buckets.start -= time;
        state.ring();
    }
}

impl State {
    fn check(&mut self, data: bool) -> Result<(), Wait> {
        let budget = self.budget.as_ref().and_then(|budget| budget.lock().check(data).err());
        let waits = self.buckets.check(data).err().into_iter().chain(budget);
        waits.max_by_key(|wait| wait.0).map_or(Ok(()), Err)
    }

    fn charge(&mut self, bytes: u64) {
        self.buckets.charge(bytes);
        if let Some(budget) = &self.budget {
            budget.lock().charge(bytes);
        }
    }

    fn ring(&self) {
        for bell in &self.bells {
            // It fails only when it has been rung far too often already.
            let _ = bell.write(1);
        }
    }
}

impl Buckets {
    fn now(&self) -> u64 {
        self.start.elapsed().as_millis().try_into().unwrap_or(u64::MAX)
    }

    /// Is there one token of an operation and, if asked for, of a byte?
    fn check(&mut self, data: bool) -> Result<(), Wait> {
        let now = self.now();
        let bandwidth = self.bandwidth.as_mut().filter(|_| data);
        let waits = [bandwidth, self.operations.as_mut()].into_iter().flatten().filter_map(|b| b.check(now).err());
        waits.max_by_key(|wait| wait.0).map_or(Ok(()), Err)
    }

    fn charge(&mut self, bytes: u64) {
        if let Some(bandwidth) = &mut self.bandwidth {
            bandwidth.charge(bytes);
        }
        if let Some(operations) = &mut self.operations {
            operations.charge(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 24 * 3600 * 1000;

    /// As many, and not another one in the time of a test.
    fn per_day(size: u64) -> Option<TokenBucket> {
        Some(TokenBucket { size, refill_ms: size * DAY, burst: 0 })
    }

    const NO_LIMIT: Option<TokenBucket> = Some(TokenBucket { size: 0, refill_ms: 0, burst: 0 });

    fn passing(limiter: &Limiter, bytes: u64) -> usize {
        (0..100).take_while(|_| limiter.take(bytes).is_ok()).count()
    }

    fn day() -> Duration {
        Duration::from_millis(DAY)
    }

    #[test]
    fn without_limits_everything_passes() {
        let limiter = Limiter::default();
        assert_eq!(passing(&limiter, u64::MAX), 100);
        assert_eq!(limiter.check(), Ok(()));
        assert_eq!(limiter.limits(), RateLimits::default());
    }

    #[test]
    fn both_limits_hold() {
        let limiter = Limiter::new(RateLimits { bandwidth: per_day(100), operations: per_day(5) });
        assert_eq!(passing(&limiter, 10), 5);
        limiter.skip(day() * 6);
        assert_eq!(passing(&limiter, 40), 2, "56 bytes were left");
        // The rest of a debt of 24 bytes is waited for, and one more; three operations are there.
        let Err(Wait(wait)) = limiter.take(1) else { panic!("it passes") };
        assert!(wait <= day() * 25 && wait > day() * 24, "{wait:?}");
    }

    #[test]
    fn what_has_to_wait_takes_nothing() {
        let limiter = Limiter::new(RateLimits { bandwidth: per_day(100), operations: per_day(1) });
        assert_eq!(passing(&limiter, 10), 1);
        for _ in 0..50 {
            assert!(limiter.take(10).is_err());
        }
        limiter.update(RateLimits { bandwidth: None, operations: NO_LIMIT });
        assert_eq!(passing(&limiter, 10), 9);
    }

    #[test]
    fn without_data_no_bandwidth_is_needed() {
        let limiter = Limiter::new(RateLimits { bandwidth: per_day(1), operations: per_day(10) });
        assert_eq!(limiter.take(1000), Ok(()));
        assert_eq!(passing(&limiter, 0), 9);
        assert_eq!(passing(&Limiter::new(RateLimits { bandwidth: per_day(1), operations: None }), 0), 100);
    }

    #[test]
    fn an_update_leaves_alone_what_it_does_not_name() {
        let limiter = Limiter::new(RateLimits { bandwidth: per_day(100), operations: per_day(3) });
        assert_eq!(passing(&limiter, 1), 3);
        limiter.update(RateLimits::default());
        assert_eq!(passing(&limiter, 1), 0);
        // The same again is a full bucket again.
        limiter.update(RateLimits { bandwidth: None, operations: per_day(3) });
        assert_eq!(passing(&limiter, 40), 3);
        assert_eq!(limiter.limits(), RateLimits { bandwidth: per_day(100), operations: per_day(3) });
        limiter.update(RateLimits { bandwidth: NO_LIMIT, operations: None });
        assert_eq!(passing(&limiter, 1), 0, "the operations");
        limiter.update(RateLimits { bandwidth: None, operations: NO_LIMIT });
        assert_eq!(passing(&limiter, 1), 100);
        assert_eq!(limiter.limits(), RateLimits::default());
    }

    #[test]
    fn limits_can_come_later() {
        let limiter = Limiter::default();
        assert_eq!(passing(&limiter, 1000), 100);
        limiter.update(RateLimits { bandwidth: None, operations: per_day(2) });
        assert_eq!(passing(&limiter, 1000), 2);
    }

    #[test]
    fn a_length_may_be_told_later() {
        let limiter = Limiter::new(RateLimits { bandwidth: per_day(10), operations: None });
        assert_eq!(limiter.check(), Ok(()));
        assert_eq!(limiter.check(), Ok(()));
        limiter.charge(10);
        assert!(limiter.check().is_err());
        limiter.skip(day());
        assert_eq!(limiter.check(), Ok(()));
    }

    #[test]
    fn a_budget_is_spent_by_all_who_share_it() {
        let budget = Arc::new(Budget::new(RateLimits { bandwidth: per_day(100), operations: None }));
        let [one, other] = [(); 2].map(|()| {
            let limiter = Limiter::default();
            limiter.spend_from(budget.clone());
            limiter
        });
        one.update(RateLimits { bandwidth: None, operations: per_day(3) });
        assert_eq!(passing(&one, 10), 3, "its own limit");
        assert_eq!(passing(&other, 10), 7, "what is left");
        assert!(one.check().is_err() && other.take(0).is_ok());
        assert_eq!(one.limits(), RateLimits { bandwidth: None, operations: per_day(3) });
        // It holds when their own limits go.
        one.update(RateLimits { bandwidth: None, operations: NO_LIMIT });
        assert_eq!(passing(&one, 10), 0);
        budget.lock().start -= day() * 100;
        assert_eq!(passing(&one, 10) + passing(&other, 10), 10);
    }

    #[test]
    fn a_bell_rings_at_each_change() {
        let bell = Arc::new(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
        let limiter = Limiter::default();
        limiter.ring_on_change(bell.clone());
        assert!(bell.read().is_err());
        limiter.update(RateLimits::default());
        limiter.update(RateLimits { bandwidth: per_day(1), operations: None });
        assert_eq!(bell.read().unwrap(), 2);
    }
}
