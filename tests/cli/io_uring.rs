//! Hosts that forbid io_uring, played by a seccomp filter.

#![expect(unsafe_code, reason = "a filter is installed between fork and exec")]

use std::os::unix::process::CommandExt;
use std::process::Command;

use tempfile::tempdir;

use crate::mistake::{LIMIT, expect_mistake, run};
use crate::support::Running;

/// The system call answers with this error from then on.
fn deny_io_uring(command: &mut Command, errno: i32) -> &mut Command {
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let filter = [
        // The number of the system call is the first word of what the filter sees.
        step((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
        step((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 0, 1, libc::SYS_io_uring_setup as u32),
        step((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: the program and its filter outlive the calls, which only read them.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: `install` makes two system calls and allocates nothing.
    unsafe { command.pre_exec(install) }
}

#[test]
fn io_uring_by_name_is_an_error_and_else_done_without() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let with = |options: &str| {
        let mut command = run();
        command.arg("--disk").arg(format!("{}{options}", path.display()));
        command
    };
    for (errno, why) in [(libc::EPERM, "kernel.io_uring_disabled"), (libc::ENOSYS, "this kernel has none")] {
        let mut command = with(",engine=io_uring");
        expect_mistake(deny_io_uring(&mut command, errno), 32, &["cannot use io_uring", "disk", why, "engine=sync"]);
        for options in ["", ",engine=auto", ",engine=sync"] {
            Running::start(deny_io_uring(&mut with(options), errno)).wait(LIMIT).expect_code(0);
        }
    }
}
