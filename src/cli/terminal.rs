//! The terminal in raw mode, and back on every way out that a process can take itself.

#![expect(unsafe_code, reason = "signal handlers")]

use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use vmm_sys_util::signal::register_signal_handler;

use crate::observe::TERMINAL_IS_RAW;

/// Raw mode, for as long as this lives.
pub struct RawTerminal;

static BEFORE: OnceLock<Termios> = OnceLock::new();

impl RawTerminal {
    /// Puts standard input into raw mode if it is a terminal: every key, Ctrl-C among them, goes to the guest.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Known before the change, so that a crash in between is undone too.
        let _ = BEFORE.set(before);
        restore_on_crash()?;
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        TERMINAL_IS_RAW.store(true, Ordering::Relaxed);
        Ok(Some(Self))
    }

    /// Has the terminal be what it was in the end, and in a crash, whatever another process of ours makes of it meanwhile.
    pub fn guard() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let _ = BEFORE.set(tcgetattr(&stdin)?);
        restore_on_crash()?;
        TERMINAL_IS_RAW.store(true, Ordering::Relaxed);
        Ok(Some(Self))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Only system calls: a signal handler may call it.
fn restore() {
    if TERMINAL_IS_RAW.swap(false, Ordering::Relaxed)
        && let Some(before) = BEFORE.get()
    {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, before);
    }
}

/// A crash (a panic aborts) restores the terminal, then takes its course.
fn restore_on_crash() -> io::Result<()> {
    extern "C" fn crashed(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        restore();
        // SAFETY: both calls are async-signal-safe; the default action ends the process.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    for signal in [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE] {
        register_signal_handler(signal, crashed)?;
    }
    Ok(())
}
