//! Log lines on standard error: `tranche: warning: text`, one write each.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// Writes events of `level` and above. Spans are not used and cost nothing.
struct StderrLog {
    level: Level,
    start: Instant,
}

/// Set while the terminal is in raw mode, where a line feed alone does not return the carriage.
pub static TERMINAL_IS_RAW: AtomicBool = AtomicBool::new(false);

/// Starts logging for the whole process; `None` is silence. A second call changes nothing.
pub fn init_log(level: Option<Level>) {
    if let Some(level) = level {
        // It fails if a log is there already, which then serves.
        let _ = tracing::subscriber::set_global_default(StderrLog { level, start: Instant::now() });
    }
}

impl Subscriber for StderrLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }

    fn event(&self, event: &Event<'_>) {
        let word = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut line = format!("tranche: {word}: ");
        if self.level >= Level::DEBUG {
            let _ = write!(line, "[{:.6}] {}: ", self.start.elapsed().as_secs_f64(), event.metadata().target());
        }
        event.record(&mut Text(&mut line));
        line.push_str(if TERMINAL_IS_RAW.load(Ordering::Relaxed) { "\r\n" } else { "\n" });
        // Nobody is left to tell when standard error is gone.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// The message first, then `key=value` fields.
struct Text<'a>(&'a mut String);

impl Visit for Text<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

/// Lets ten events a second through.
pub struct GuestLimiter {
    /// Seconds since the first event, and how many came in that second.
    second: AtomicU64,
    count: AtomicU32,
}

const EVENTS_PER_SECOND: u32 = 10;

impl GuestLimiter {
    #[must_use]
    #[expect(clippy::new_without_default, reason = "only ever a static, for which `new` is const")]
    pub const fn new() -> Self {
        Self { second: AtomicU64::new(0), count: AtomicU32::new(0) }
    }

    pub fn allows(&self) -> bool {
        static START: Mutex<Option<Instant>> = Mutex::new(None);
        let elapsed = START.lock().map_or(Duration::ZERO, |mut start| start.get_or_insert_with(Instant::now).elapsed());
        self.allows_at(elapsed.as_secs())
    }

    fn allows_at(&self, now: u64) -> bool {
        if self.second.swap(now, Ordering::Relaxed) != now {
            self.count.store(0, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed) < EVENTS_PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_a_second_and_no_more() {
        let limiter = GuestLimiter::new();
        assert_eq!((0..1000).filter(|_| limiter.allows_at(0)).count(), 10);
        assert_eq!((0..1000).filter(|_| limiter.allows_at(1)).count(), 10);
    }
}
