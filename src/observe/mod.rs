//! Logs and the boot timeline.

mod counters;
mod log;
mod time;
mod timeline;

pub use counters::{Counter, Exits, Traffic};
pub use log::{Choice, GuestLimiter, TERMINAL_IS_RAW, change_log, init_firecracker_log, init_log};
pub use time::rfc3339;
pub use timeline::{Milestone, Timeline};

/// Warns of something the guest did. One place in the code warns at most ten times a minute, and says then how many
/// warnings it kept back before, so that a guest cannot fill a disk with its deeds. What is kept back is not even
/// formatted.
#[macro_export]
macro_rules! guest_warning {
    ($($arg:tt)*) => {{
        static LIMITER: $crate::observe::GuestLimiter = $crate::observe::GuestLimiter::new();
        if let Some(kept_back) = LIMITER.allows() {
            if kept_back > 0 {
                tracing::warn!("{kept_back} warnings like the next one were kept back");
            }
            tracing::warn!($($arg)*);
        }
    }};
}
pub use guest_warning;
