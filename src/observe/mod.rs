//! Logs and the boot timeline.

mod log;
mod timeline;

pub use log::{GuestLimiter, TERMINAL_IS_RAW, init_log};
pub use timeline::{Milestone, Timeline};

/// Warns of something the guest did. One place in the code warns at most ten times a second, so that a guest
/// cannot fill a disk with its deeds.
#[macro_export]
macro_rules! guest_warning {
    ($($arg:tt)*) => {{
        static LIMITER: $crate::observe::GuestLimiter = $crate::observe::GuestLimiter::new();
        if LIMITER.allows() {
            tracing::warn!($($arg)*);
        }
    }};
}
pub use guest_warning;
