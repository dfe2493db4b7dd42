//! Log lines, one write each: `tranche: warning: text` on standard error, or as Firecracker writes them.
//!
//! Where they go, how they look and which are written can change while the program runs.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Instant, SystemTime};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber, span};

use super::time;

/// How lines look, where they go, and which are written.
struct Log {
    style: Style,
    start: Instant,
    choice: RwLock<Choice>,
}

enum Style {
    /// `tranche: warning: text`
    Tranche,
    /// `2026-11-23T14:25:56.192744248 [id:thread:LEVEL:file:line] text`
    Firecracker { id: String },
}

/// What a client may choose.
#[derive(Debug)]
pub struct Choice {
    pub level: LevelFilter,
    /// Standard error, or standard output in Firecracker's style, without one.
    pub file: Option<File>,
    pub show_level: bool,
    pub show_origin: bool,
    /// Only what comes from a module whose path begins like this.
    pub module: Option<String>,
}

/// The process's log.
static LOG: OnceLock<&'static Log> = OnceLock::new();

/// Set while the terminal is in raw mode, where a line feed alone does not return the carriage.
pub static TERMINAL_IS_RAW: AtomicBool = AtomicBool::new(false);

/// Starts logging for the whole process; `None` is silence, until [`change_log`] breaks it. A second call changes
/// nothing.
pub fn init_log(level: Option<Level>) {
    start_log(Style::Tranche, LevelFilter::from(level));
}

/// Starts logging as Firecracker does, for the VM `id`.
pub fn init_firecracker_log(id: &str) {
    start_log(Style::Firecracker { id: id.to_owned() }, LevelFilter::INFO);
}

fn start_log(style: Style, level: LevelFilter) {
    let choice = Choice { level, file: None, show_level: false, show_origin: false, module: None };
    let log = Log { style, start: Instant::now(), choice: RwLock::new(choice) };
    if LOG.get().is_none() {
        // It lives as long as the process, as what is logged to does.
        let log: &'static Log = Box::leak(Box::new(log));
        if LOG.set(log).is_ok() {
            // It fails if a log is there already, which then serves.
            let _ = tracing::subscriber::set_global_default(Handle(log));
        }
    }
}

/// Changes what a client may choose. Without a log, nothing.
pub fn change_log(change: impl FnOnce(&mut Choice)) {
    if let Some(log) = LOG.get() {
        change(&mut log.choice.write().unwrap_or_else(PoisonError::into_inner));
        // Which places in the code have something to say is remembered there.
        tracing::callsite::rebuild_interest_cache();
    }
}

struct Handle(&'static Log);

impl Choice {
    fn wants(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
            && self.module.as_deref().is_none_or(|module| metadata.target().starts_with(module))
    }
}

impl Log {
    /// The line for an event, without its end.
    fn line(&self, choice: &Choice, event: &Event<'_>) -> String {
        let metadata = event.metadata();
        let mut line = match &self.style {
            Style::Tranche => {
                let word = match *metadata.level() {
                    Level::ERROR => "error",
                    Level::WARN => "warning",
                    Level::INFO => "info",
                    Level::DEBUG => "debug",
                    Level::TRACE => "trace",
                };
                let mut line = format!("tranche: {word}: ");
                if choice.level >= LevelFilter::DEBUG {
                    let _ = write!(line, "[{:.6}] {}: ", self.start.elapsed().as_secs_f64(), metadata.target());
                }
                line
            }
            Style::Firecracker { id } => {
                let thread = std::thread::current();
                let mut line = time::local(SystemTime::now());
                let _ = write!(line, " [{id}:{}", thread.name().unwrap_or("unnamed"));
                if choice.show_level {
                    let _ = write!(line, ":{}", metadata.level());
                }
                if choice.show_origin {
                    let (file, at) = (metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
                    let _ = write!(line, ":{file}:{at}");
                }
                line.push_str("] ");
                line
            }
        };
        event.record(&mut Text(&mut line));
        line
    }
}

impl Subscriber for Handle {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.choice.read().unwrap_or_else(PoisonError::into_inner).wants(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.0.choice.read().unwrap_or_else(PoisonError::into_inner).level)
    }

    fn event(&self, event: &Event<'_>) {
        let choice = self.0.choice.read().unwrap_or_else(PoisonError::into_inner);
        let mut line = self.0.line(&choice, event);
        let terminal = choice.file.is_none() && TERMINAL_IS_RAW.load(Ordering::Relaxed);
        line.push_str(if terminal { "\r\n" } else { "\n" });
        // Nobody is left to tell when there is nowhere to write to.
        let _ = match (choice.file.as_ref(), &self.0.style) {
            (Some(file), _) => (&*file).write_all(line.as_bytes()),
            (None, Style::Tranche) => io::stderr().write_all(line.as_bytes()),
            (None, Style::Firecracker { .. }) => io::stdout().write_all(line.as_bytes()),
        };
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
