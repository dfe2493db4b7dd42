//! What threads may still ask of the kernel: a policy for each kind of them (`policies/`), compiled with the program.
//!
//! Whatever is not allowed there is trapped: the process tells its parent which call it was, and ends.

#![expect(unsafe_code, reason = "installing filters, and a signal handler")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::thread::set_no_new_privs;
use rustix::time::ClockId;
use vmm_sys_util::signal::register_signal_handler;

use crate::threads::{Kind, kind_of_this_thread};

mod programs {
    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

/// The first byte of the message that tells of a call that was not allowed. What follows is its number and its second
/// argument, in the machine's order of bytes, and the thread's kind.
pub const VIOLATION: u8 = 0xff;
pub const VIOLATION_BYTES: usize = 10;

/// The descriptor where violations are told; on standard error, for whoever reads that, if there is none.
static TOLD: AtomicI32 = AtomicI32::new(-1);

/// The exit code of a process that has done what it may not.
static EXIT_CODE: AtomicI32 = AtomicI32::new(8);

/// Has calls that are not allowed told to `parent`, which stays open.
///
/// # Errors
/// The host's.
pub fn tell_of_violations(parent: &OwnedFd) -> io::Result<()> {
    TOLD.store(parent.as_raw_fd(), Ordering::Relaxed);
    Ok(register_signal_handler(libc::SIGSYS, trapped)?)
}

/// Gets a process without a parent ready for filters, before it has other threads: it has no new privileges any more, and
/// violations are told on standard error, and end it with this code.
///
/// # Errors
/// The host's.
pub fn prepare_opener(code: libc::c_int) -> io::Result<()> {
    set_no_new_privs(true)?;
    EXIT_CODE.store(code, Ordering::Relaxed);
    Ok(register_signal_handler(libc::SIGSYS, trapped)?)
}

extern "C" fn trapped(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    /// Where `si_syscall` is in a `siginfo_t`: behind three numbers, a gap and a pointer.
    const SI_SYSCALL: usize = 24;
    // SAFETY: the kernel hands over a whole siginfo_t, which that number is part of for SIGSYS.
    let number = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<i32>().read() };
    // SAFETY: what the kernel hands over is a ucontext_t.
    let argument = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RSI as usize] };
    let mut message = [VIOLATION; VIOLATION_BYTES];
    message[1..5].copy_from_slice(&number.to_ne_bytes());
    message[5..9].copy_from_slice(&(argument as u32).to_ne_bytes());
    message[9] = kind_of_this_thread() as u8;
    let parent = TOLD.load(Ordering::Relaxed);
    // SAFETY: both calls are async-signal-safe, and the messages are there for as long as they take.
    unsafe {
        if parent >= 0 {
            libc::write(parent, message.as_ptr().cast(), message.len());
        } else {
            let mut text = *b"Shutting down VM after intercepting a bad syscall (   ).\n";
            // No allocation is to be made here.
            let digits = [number / 100, number / 10, number].map(|digit| b'0' + (digit % 10) as u8);
            text[51..54].copy_from_slice(&digits);
            libc::write(2, text.as_ptr().cast(), text.len());
        }
        libc::_exit(EXIT_CODE.load(Ordering::Relaxed));
    }
}

/// Reads a message of [`trapped`]: the call's name, and the kind of the thread.
#[must_use]
pub fn read_violation(message: &[u8]) -> Option<(String, &'static str)> {
    let (numbers, kind) = match message {
        [VIOLATION, numbers @ .., kind] if message.len() == VIOLATION_BYTES => (numbers, kind),
        _ => return None,
    };
    let (number, argument) = numbers.split_at(4);
    let number = u32::from_ne_bytes(number.try_into().ok()?);
    let argument = u32::from_ne_bytes(argument.try_into().ok()?);
    let name = usize::try_from(number).ok().and_then(|number| programs::NAMES.split('\n').nth(number));
    let name = match name.filter(|name| !name.is_empty()) {
        // The one that is many.
        Some("ioctl") => format!("ioctl({argument:#x})"),
        Some(name) => name.to_owned(),
        None => format!("number {number}"),
    };
    let kinds = [Kind::Main, Kind::Vcpu, Kind::Api, Kind::Io];
    let kind = kinds.into_iter().find(|known| *known as u8 == *kind)?;
    Some((name, kind.name()))
}

/// Has this thread do no more than its kind needs.
///
/// # Errors
/// The host's.
pub fn confine(kind: Kind) -> io::Result<()> {
    install_all(kind, of(kind))
}

/// The same in a process without a parent, which opens for itself what clients name.
///
/// # Errors
/// The host's.
pub fn confine_opener(kind: Kind) -> io::Result<()> {
    let programs = match kind {
        Kind::Main => programs::OPEN_MAIN,
        Kind::Api => programs::OPEN_API,
        Kind::Vcpu | Kind::Io => of(kind),
    };
    install_all(kind, programs)
}

type Programs = &'static [&'static [[u8; 8]]];

fn of(kind: Kind) -> Programs {
    match kind {
        Kind::Main => programs::MAIN,
        Kind::Vcpu => programs::VCPU,
        Kind::Api => programs::API,
        Kind::Io => programs::IO,
    }
}

#[cfg_attr(not(debug_assertions), expect(unused_variables, reason = "only an attacker wants to know the kind"))]
fn install_all(kind: Kind, programs: Programs) -> io::Result<()> {
    // rustix asks for the process's auxiliary vector once, when it is first to tell the time.
    let _ = rustix::time::clock_gettime(ClockId::Monotonic);
    #[cfg(debug_assertions)]
    let programs = if super::attacker::goes_unfiltered() { &[] } else { programs };
    // The last ones refuse single calls with an error. The first one may not allow that others follow.
    programs.iter().rev().try_for_each(|program| install(program))?;
    #[cfg(debug_assertions)]
    super::attacker::attack(kind, TOLD.load(Ordering::Relaxed));
    Ok(())
}

fn install(program: &'static [[u8; 8]]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        // The kernel copies them, and only reads.
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the program is as long as it says, in the form that the kernel takes, and outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_their_names() {
        let told = |number: i32| {
            let mut message = [VIOLATION; VIOLATION_BYTES];
            message[1..5].copy_from_slice(&number.to_ne_bytes());
            message[9] = Kind::Vcpu as u8;
            read_violation(&message)
        };
        assert_eq!(told(libc::SYS_openat as i32), Some(("openat".into(), "vcpu")));
        assert_eq!(told(100_000), Some(("number 100000".into(), "vcpu")));
        assert_eq!(read_violation(b"{}"), None);
    }
}
