//! Log lines on standard error: `tranche: warning: text`, one write each.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

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

/// Lets ten events a minute through.
pub struct GuestLimiter(Mutex<Minute>);

/// What came in a minute.
struct Minute {
    /// Since the first event of the process.
    number: u64,
    events: u64,
}

const EVENTS_PER_MINUTE: u64 = 10;

impl GuestLimiter {
    #[must_use]
    #[expect(clippy::new_without_default, reason = "only ever a static, for which `new` is const")]
    pub const fn new() -> Self {
        Self(Mutex::new(Minute { number: 0, events: 0 }))
    }

    /// `Some` for an event that may be told of, with how many before it may not.
    pub fn allows(&self) -> Option<u64> {
        static START: OnceLock<Instant> = OnceLock::new();
        self.allows_at(START.get_or_init(Instant::now).elapsed().as_secs() / 60)
    }

    fn allows_at(&self, minute: u64) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept_back = 0;
        // Two threads may have read the clock in the other order: it never goes back.
        if minute > state.number {
            kept_back = state.events.saturating_sub(EVENTS_PER_MINUTE);
            *state = Minute { number: minute, events: 0 };
        }
        state.events += 1;
        (state.events <= EVENTS_PER_MINUTE).then_some(kept_back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_a_minute_and_no_more() {
        let limiter = GuestLimiter::new();
        let let_through = |minute, count| {
            (0..count).filter_map(|_| limiter.allows_at(minute)).fold((0, 0), |(n, kept), more| (n + 1, kept + more))
        };
        assert_eq!(let_through(0, 1000), (10, 0));
        assert_eq!(let_through(1, 500), (10, 990), "it says how many were kept back");
        assert_eq!(let_through(0, 500), (0, 0), "a clock that was read late opens no new minute");
        assert_eq!(let_through(7, 3), (3, 990));
        assert_eq!(let_through(8, 3), (3, 0));
    }

    #[test]
    fn what_is_kept_back_is_not_formatted() {
        let formatted = std::cell::Cell::new(0);
        struct Counted<'a>(&'a std::cell::Cell<u32>);
        impl fmt::Display for Counted<'_> {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.set(self.0.get() + 1);
                Ok(())
            }
        }
        struct Reader;
        impl Subscriber for Reader {
            fn enabled(&self, _: &Metadata<'_>) -> bool {
                true
            }
            fn event(&self, event: &Event<'_>) {
                event.record(&mut Text(&mut String::new()));
            }
            fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
                span::Id::from_u64(1)
            }
            fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
            fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
            fn enter(&self, _: &span::Id) {}
            fn exit(&self, _: &span::Id) {}
        }
        tracing::subscriber::with_default(Reader, || {
            for _ in 0..100_000 {
                crate::observe::guest_warning!("{}", Counted(&formatted));
            }
        });
        // Twenty, if a minute of the process ended just now.
        assert!([10, 20].contains(&formatted.get()), "{} times", formatted.get());
    }
}
