//! A VMM that a guest has taken over, for tests: never part of a release, which is built without debug assertions.
//!
//! `TRANCHE_ATTACK=KIND:ATTEMPT` has the first confined thread of a kind try something when the guest is about to run, say
//! on standard error what came of it, and end the process. `TRANCHE_ATTACK_UNFILTERED` leaves its seccomp filter out, so
//! that what is behind it is tried.

#![expect(unsafe_code, reason = "system calls that nobody else would make")]

use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

use rustix::net::SendFlags;

use super::wire::{self, Ask, Given};
use crate::backend::HostFile;
use crate::backend::disk::uring::kept_ring;
use crate::control::NextSize;
use crate::threads::Kind;

/// What a test waits for.
const EXIT_CODE: i32 = 77;

static GUEST_IS_ABOUT_TO_RUN: AtomicBool = AtomicBool::new(false);

/// Is this thread to go without its filter?
pub fn goes_unfiltered() -> bool {
    std::env::var_os("TRANCHE_ATTACK_UNFILTERED").is_some()
}

/// Tries what this thread is to try, if it is to.
pub fn attack(kind: Kind, parent: i32) {
    if kind == Kind::Main {
        GUEST_IS_ABOUT_TO_RUN.store(true, Ordering::Relaxed);
    }
    let Ok(wanted) = std::env::var("TRANCHE_ATTACK") else { return };
    let Some((wanted, attempt)) = wanted.split_once(':') else { return };
    if wanted != kind.name() {
        return;
    }
    while !GUEST_IS_ABOUT_TO_RUN.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
    // One of them will do.
    static HAS_BEGUN: AtomicBool = AtomicBool::new(false);
    while HAS_BEGUN.swap(true, Ordering::Relaxed) {
        std::thread::park();
    }
    let told = match try_it(attempt, parent) {
        Ok(()) => "done".to_owned(),
        Err(error) => error.to_string(),
    };
    let _ = writeln!(io::stderr(), "attack: {attempt}: {told}");
    // SAFETY: it ends the process, and returns nowhere.
    unsafe { libc::_exit(EXIT_CODE) };
}

/// The same without a jail.
///
/// # Errors
/// None.
pub fn attack_unjailed(kind: Kind) -> io::Result<()> {
    // There is no other thread of which it would have to be known.
    GUEST_IS_ABOUT_TO_RUN.store(true, Ordering::Relaxed);
    attack(kind, -1);
    Ok(())
}

fn call(number: libc::c_long, arguments: [usize; 6]) -> io::Result<usize> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: whatever it does, it does to a process that has been taken over; its pointers are to what is there.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as usize),
    }
}

fn path(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

/// The victim that the test has chosen: a path, or a process.
fn victim() -> String {
    std::env::var("TRANCHE_VICTIM").unwrap_or_default()
}

fn open(text: &str, flags: libc::c_int) -> io::Result<()> {
    let path = path(text);
    call(libc::SYS_openat, [libc::AT_FDCWD as usize, path.as_ptr().addr(), flags as usize, 0o600, 0, 0]).map(drop)
}

fn connect(name: &[u8]) -> io::Result<()> {
    let socket = call(libc::SYS_socket, [libc::AF_UNIX as usize, libc::SOCK_STREAM as usize, 0, 0, 0, 0])?;
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend(name);
    call(libc::SYS_connect, [socket, address.as_ptr().addr(), address.len(), 0, 0, 0]).map(drop)
}

fn map(protection: libc::c_int, bytes: usize) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    call(libc::SYS_mmap, [0, bytes, protection as usize, flags as usize, usize::MAX, 0])
}

/// Asks the parent for something until it gets it, or hears that it does not.
fn ask(parent: i32, ask: &Ask, fds: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor stays open as long as the process.
    let parent = unsafe { BorrowedFd::borrow_raw(parent) };
    loop {
        wire::send(parent, ask, fds, SendFlags::empty())?;
        let mut received = wire::receive(parent)?.ok_or(io::ErrorKind::BrokenPipe)?;
        match (received.parse()?, received.fd()) {
            (Given::Failed(error), _) => return Err(error),
            (_, Ok(file)) => return Ok(file),
            // The answer to what another thread has asked.
            _ => {}
        }
    }
}

fn ask_for(parent: i32, file: HostFile) -> io::Result<()> {
    ask(parent, &Ask::Open(file), &[]).map(drop)
}

/// Has a ring of the VMM's, or one of our own, do something.
fn through_ring(entry: &io_uring::squeue::Entry) -> io::Result<()> {
    let mut ring = kept_ring().map_or_else(|| IoUring::new(1), Ok)?;
    // SAFETY: what it points to is there until the ring is gone.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next().map(|entry| entry.result()) {
        Some(error) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
        _ => Ok(()),
    }
}

fn try_it(attempt: &str, parent: i32) -> io::Result<()> {
    let victim = victim();
    let process = victim.parse().unwrap_or(1usize);
    let none = [0; 6];
    match attempt {
        "open-shadow" => open("/etc/shadow", libc::O_RDONLY),
        "open-disk" => open(&victim, libc::O_RDWR),
        "write-file" => open("/attack", libc::O_RDWR | libc::O_CREAT),
        "list-processes" => open("/proc", libc::O_RDONLY | libc::O_DIRECTORY),
        "connect-socket" => connect(&[victim.as_bytes(), &[0]].concat()),
        "connect-abstract" => connect(&[&[0], victim.as_bytes()].concat()),
        "ptrace" => call(libc::SYS_ptrace, [libc::PTRACE_SEIZE as usize, process, 0, 0, 0, 0]).map(drop),
        "read-memory" => {
            let mut buffer = [0u8; 8];
            let local = [buffer.as_mut_ptr().addr(), buffer.len()];
            let remote = [0x40_0000usize, 8];
            let arguments = [process, local.as_ptr().addr(), 1, remote.as_ptr().addr(), 1, 0];
            call(libc::SYS_process_vm_readv, arguments).map(drop)
        }
        "kill" => call(libc::SYS_kill, [process, libc::SIGTERM as usize, 0, 0, 0, 0]).map(drop),
        "mount" => {
            let (kind, place) = (path("tmpfs"), path("/"));
            call(libc::SYS_mount, [kind.as_ptr().addr(), place.as_ptr().addr(), kind.as_ptr().addr(), 0, 0, 0])
                .map(drop)
        }
        "unshare" => call(libc::SYS_unshare, [libc::CLONE_NEWNS as usize, 0, 0, 0, 0, 0]).map(drop),
        "chroot" => call(libc::SYS_chroot, [path("/").as_ptr().addr(), 0, 0, 0, 0, 0]).map(drop),
        "load-module" => {
            let text = path("");
            call(libc::SYS_init_module, [text.as_ptr().addr(), 1, text.as_ptr().addr(), 0, 0, 0]).map(drop)
        }
        "internet-socket" => {
            call(libc::SYS_socket, [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0, 0, 0]).map(drop)
        }
        "connect-internet" => {
            let socket = call(libc::SYS_socket, [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0, 0, 0])?;
            let port: u16 = victim.parse().unwrap_or(0);
            let mut address = (libc::AF_INET as u16).to_ne_bytes().to_vec();
            address.extend(port.to_be_bytes());
            address.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            call(libc::SYS_connect, [socket, address.as_ptr().addr(), address.len(), 0, 0, 0]).map(drop)
        }
        "packet-socket" => {
            call(libc::SYS_socket, [libc::AF_PACKET as usize, libc::SOCK_RAW as usize, 0x300, 0, 0, 0]).map(drop)
        }
        "exec" => {
            let program = path("/bin/true");
            let argv = [program.as_ptr().addr(), 0];
            call(libc::SYS_execve, [program.as_ptr().addr(), argv.as_ptr().addr(), 0, 0, 0, 0]).map(drop)
        }
        "map-code" => map(libc::PROT_READ | libc::PROT_EXEC, 4096).map(drop),
        "make-code" => {
            let page = map(libc::PROT_READ | libc::PROT_WRITE, 4096)?;
            let code = libc::PROT_READ | libc::PROT_EXEC;
            call(libc::SYS_mprotect, [page, 4096, code as usize, 0, 0, 0]).map(drop)
        }
        "fork" => match call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])? {
            // SAFETY: the child ends at once.
            0 => unsafe { libc::_exit(0) },
            _ => Ok(()),
        },
        "fork-bomb" => {
            (0..5000).try_for_each(|_| match call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])? {
                // SAFETY: the child ends at once, and is there until somebody asks for it.
                0 => unsafe { libc::_exit(0) },
                _ => Ok(()),
            })
        }
        // To its group, in which a process is also that it cannot see.
        "signal-parent" => call(libc::SYS_kill, [0, libc::SIGUSR1 as usize, 0, 0, 0, 0]).map(drop),
        "fork-by-clone3" => {
            let mut arguments = [0u64; 11];
            arguments[4] = libc::SIGCHLD as u64;
            let size = size_of_val(&arguments);
            match call(libc::SYS_clone3, [arguments.as_ptr().addr(), size, 0, 0, 0, 0])? {
                // SAFETY: the child ends at once.
                0 => unsafe { libc::_exit(0) },
                _ => Ok(()),
            }
        }
        "fill-memory" => (0..64).try_for_each(|_| map(libc::PROT_READ | libc::PROT_WRITE, 1 << 30).map(drop)),
        "fill-disk" => {
            let grow = |fd: usize| call(libc::SYS_ftruncate, [fd, 1 << 40, 0, 0, 0, 0]);
            let writable = |result: &io::Result<usize>| !matches!(result, Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EBADF | libc::EPERM)));
            (3..200).map(grow).find(writable).unwrap_or(Err(io::ErrorKind::NotFound.into())).map(drop)
        }
        "raise-limit" => {
            let limit = [libc::RLIM_INFINITY, libc::RLIM_INFINITY];
            call(libc::SYS_prlimit64, [0, libc::RLIMIT_NPROC as usize, limit.as_ptr().addr(), 0, 0, 0]).map(drop)
        }
        "add-key" => {
            let (kind, name) = (path("user"), path("attack"));
            let (kind, name) = (kind.as_ptr().addr(), name.as_ptr().addr());
            call(libc::SYS_add_key, [kind, name, name, 4, -3i32 as usize, 0]).map(drop)
        }
        "make-ring" => {
            let parameters = [0u8; 120];
            call(libc::SYS_io_uring_setup, [1, parameters.as_ptr().addr(), 0, 0, 0, 0]).map(drop)
        }
        "ring-open" => {
            let path = path("/etc/shadow");
            through_ring(&opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build())
        }
        "ring-connect" => {
            // To some address, of what is open as descriptor 0: no matter which, it is not even looked at.
            let address = [0u8; 16];
            through_ring(&opcode::Connect::new(Fd(0), address.as_ptr().cast(), 16).build())
        }
        "bpf" => call(libc::SYS_bpf, none).map(drop),
        "perf" => {
            let attributes = [0u8; 128];
            call(libc::SYS_perf_event_open, [attributes.as_ptr().addr(), 0, usize::MAX, usize::MAX, 0, 0]).map(drop)
        }
        "reboot" => call(libc::SYS_reboot, [0xfee1_dead, 0x2812_1969, 0, 0, 0, 0]).map(drop),
        "handle-signals" => {
            let action = [0u64; 4];
            call(libc::SYS_rt_sigaction, [libc::SIGSYS as usize, action.as_ptr().addr(), 0, 8, 0, 0]).map(drop)
        }
        "push-keys" => {
            let key = [b'x'];
            call(libc::SYS_ioctl, [0, libc::TIOCSTI as usize, key.as_ptr().addr(), 0, 0, 0]).map(drop)
        }
        "ask-for-shadow" => ask_for(parent, HostFile::BootFile("/etc/shadow".into())),
        "ask-for-disk" => ask_for(parent, HostFile::Disk { path: victim.into(), read_only: true }),
        "ask-to-write" => ask_for(parent, HostFile::Disk { path: victim.into(), read_only: false }),
        "ask-for-more" => {
            let known = HostFile::Disk { path: victim.into(), read_only: true };
            let file = ask(parent, &Ask::Open(known), &[])?;
            loop {
                let again = ask(parent, &Ask::OpenAgain { read_only: false }, &[file.as_fd()])?;
                // Else it is what was asked for before.
                if rustix::fs::fcntl_getfl(&again)?.contains(rustix::fs::OFlags::RDWR) {
                    return Ok(());
                }
            }
        }
        "ask-to-grow" => {
            let size = NextSize { cpus: Some(64), memory: None };
            ask(parent, &Ask::KeepSize(size), &[]).map(drop)
        }
        "ask-for-pagemap" => {
            let pagemap = crate::memory::pagemap()?;
            ask(parent, &Ask::OpenAgain { read_only: true }, &[pagemap.as_fd()]).map(drop)
        }
        "take-lease" => {
            let arguments = [0, libc::F_SETLEASE as usize, libc::F_RDLCK as usize, 0, 0, 0];
            call(libc::SYS_fcntl, arguments).map(drop)
        }
        "read-environment" => std::env::var("SECRET").map(drop).map_err(io::Error::other),
        "read-inherited" => {
            let mut byte = [0u8];
            call(libc::SYS_read, [process, byte.as_mut_ptr().addr(), 1, 0, 0, 0]).map(drop)
        }
        _ => panic!("an unknown attempt"),
    }
}
