//! A process that is about to become a program of the host, such as e2fsck, to work on a file that a guest has written: what
//! takes the program over finds itself with that file, the host's programs to read, and nothing to talk to.

use std::io;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, sock_filter,
};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ConfineError {
    #[error("the host's kernel cannot confine it: Landlock (Linux 5.13) is missing or switched off")]
    NoLandlock,
    #[error("Landlock")]
    Landlock(#[from] RulesetError),
    #[error("the filter of system calls")]
    Filter(#[source] seccompiler::BackendError),
    #[error("seccomp")]
    Seccomp(#[source] seccompiler::Error),
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
}

/// What programs consist of, and what they look up about the host.
const READABLE: [&str; 8] = ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc/self", "/proc/swaps"];

/// Most address space, in bytes: what e2fsck takes for a file system of 16 TiB.
const MEMORY: u64 = 4 << 30;
/// Most time of a CPU, in seconds.
const CPU_TIME: u64 = 600;

/// The first two numbers of the running kernel's version.
#[must_use]
pub fn kernel_version() -> (u32, u32) {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The version of Landlock that the host's kernel has; none without.
#[must_use]
#[expect(unsafe_code, reason = "a system call that nobody has wrapped")]
pub fn landlock_version() -> Option<u32> {
    const VERSION: libc::c_ulong = 1;
    // SAFETY: without attributes, and with this flag, the call only tells a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION) };
    u32::try_from(version).ok().filter(|&version| version > 0)
}

/// Takes everything away from this process but `file`, which stays open, and what programs are made of.
///
/// # Errors
/// When the host's kernel cannot do that. What has been taken away by then is gone.
pub fn confine_to_file(file: BorrowedFd<'_>) -> Result<(), ConfineError> {
    let host = |what| move |error: rustix::io::Errno| ConfineError::Host { what, source: error.into() };
    for (resource, limit) in [(Resource::Core, 0), (Resource::As, MEMORY), (Resource::Cpu, CPU_TIME)] {
        // A user cannot raise one that is lower.
        let limit = getrlimit(resource).maximum.map_or(limit, |known| known.min(limit));
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        setrlimit(resource, limit).map_err(host("limit its resources"))?;
    }
    set_no_new_privs(true).map_err(host("keep it from new privileges"))?;
    // Of root: the file may be another user's, and is opened anew by its path below /proc/self/fd.
    let kept = rustix::thread::capabilities(None).map_err(host("look at its capabilities"))?.permitted
        & CapabilitySet::DAC_OVERRIDE;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(host("take its capabilities away"))?;
    let status = restrict(file)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(ConfineError::NoLandlock);
    }
    refuse_calls()
}

/// System calls that fail from now on. The first two: resize2fs cuts a file off where it believes that the file system on
/// it ends, which may be in its midst when there is a partition table before it. The others are of no use to a tool.
const REFUSED: [libc::c_long; 32] = [
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_send_signal,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_open_by_handle_at,
    libc::SYS_shmget,
    libc::SYS_msgget,
    libc::SYS_mq_open,
];

/// The same calls have other numbers for programs of the x32 ABI, of which no tool is one.
const REFUSE_X32: [sock_filter; 3] = [
    sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: 0 },
    sock_filter { code: (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16, jt: 0, jf: 1, k: 0x4000_0000 },
    sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
    },
];

fn refuse_calls() -> Result<(), ConfineError> {
    let of_another = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, 0)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(ConfineError::Filter)?;
    let rules = REFUSED.iter().map(|&call| (call, Vec::new())).chain([(libc::SYS_prlimit64, vec![of_another])]);
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules.collect(), SeccompAction::Allow, refuse, TargetArch::x86_64);
    let mut program: BpfProgram = filter.and_then(TryInto::try_into).map_err(ConfineError::Filter)?;
    program.splice(0..0, REFUSE_X32);
    apply_filter(&program).map_err(ConfineError::Seccomp)
}

fn restrict(file: BorrowedFd<'_>) -> Result<landlock::RestrictionStatus, RulesetError> {
    let read = AccessFs::from_read(ABI::V1);
    let write: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rule(PathBeneath::new(file, write))?;
    if let Ok(null) = PathFd::new("/dev/null") {
        rules = rules.add_rule(PathBeneath::new(null, write))?;
    }
    for path in READABLE {
        // What this host does not have, nobody needs.
        if let Ok(path) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(path, read))?;
        }
    }
    rules.restrict_self()
}
