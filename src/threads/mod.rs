//! Threads of a VM: each is of a kind, and begins with giving up what its kind does not need.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// What a thread is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Owns the machine, or works for the one that does.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Serves clients of the API.
    Api,
    /// Serves a device's queues.
    Io,
}

impl Kind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Api => "api",
            Self::Io => "io",
        }
    }
}

thread_local! {
    static THIS: Cell<Kind> = const { Cell::new(Kind::Main) };
}

/// Which kind this thread is of. A signal handler may ask.
#[must_use]
pub fn kind_of_this_thread() -> Kind {
    THIS.get()
}

/// How a thread gives up what it does not need.
pub type Confine = fn(Kind) -> io::Result<()>;

static CONFINE: OnceLock<Confine> = OnceLock::new();

/// Has every thread that begins from now on begin with `confine`.
pub fn confine_with(confine: Confine) {
    let _ = CONFINE.set(confine);
}

/// Has this thread give up what its kind does not need.
///
/// # Errors
/// The host's: it has kept something, and is not to go on.
pub fn confine(kind: Kind) -> io::Result<()> {
    THIS.set(kind);
    CONFINE.get().map_or(Ok(()), |confine| confine(kind))
}

/// Starts a thread, with so many bytes of stack if not as many as usual.
///
/// # Errors
/// When the host has no more of them.
pub fn spawn<T: Send + 'static>(
    kind: Kind,
    name: &str,
    stack: Option<usize>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = Builder::new().name(name.to_owned());
    let builder = stack.into_iter().fold(builder, Builder::stack_size);
    builder.spawn(move || {
        // What is not confined must not see a guest's first byte.
        if let Err(error) = confine(kind) {
            tracing::error!("a thread cannot be confined: {error}");
            std::process::abort();
        }
        work()
    })
}
