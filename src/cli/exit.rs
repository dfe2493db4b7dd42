//! Exit codes, and errors as a user reads them: what failed, why, and what to do.

use std::borrow::Cow;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use crate::backend::disk::DiskError;
use crate::backend::tap::TapError;
use crate::boot::{BootError, Minimum};
use crate::kernels::KernelsError;
use crate::machine::{End, KvmError, MachineError, StateError};
use crate::memory::MemoryError;
use crate::store::StoreError;

/// How the program ends. The numbers are a promise: docs/exit-codes.md lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    PowerOff = 0,
    Internal = 1,
    // 2 is clap's, for a command line that makes no sense.
    Usage = 2,
    Reset = 3,
    Panicked = 4,
    Killed = 5,
    GuestFault = 6,
    MemoryLost = 7,
    JailBroken = 8,
    MemoryTaken = 9,
    NoKvm = 10,
    KvmPermission = 11,
    KvmCapability = 12,
    NoHugePages = 13,
    NoMemoryPolicy = 14,
    NoJail = 15,
    KernelUnreadable = 20,
    NotAKernel = 21,
    KernelDamaged = 22,
    KernelDoesNotFit = 23,
    InitrdUnreadable = 24,
    InitrdDoesNotFit = 25,
    Cmdline = 26,
    DiskUnreadable = 30,
    DiskLocked = 31,
    DiskUnusable = 32,
    DiskImage = 33,
    DiskBacking = 34,
    DiskUnwritable = 35,
    NoSuchTap = 40,
    TapUnusable = 41,
    NoVhost = 42,
    NoUserNetwork = 43,
    Serial = 50,
    NoSuchKernel = 60,
    KernelExists = 61,
    PackageUnreadable = 62,
    PackageUnusable = 63,
    KernelLibrary = 64,
    KernelBundleDamaged = 65,
    ApiRefused = 70,
    NoApi = 71,
    ApiSocket = 72,
    Description = 73,
    SnapshotUnreadable = 80,
    SnapshotDamaged = 81,
    SnapshotIncompatible = 82,
    SnapshotUnwritable = 83,
    NoSuchVm = 90,
    VmExists = 91,
    VmBusy = 92,
    VmNotRunning = 93,
    VmDefinition = 94,
    VmStore = 95,
    TimedOut = 96,
    NotResized = 97,
    RolledBack = 98,
    HostUnfit = 99,
}

pub const HELP: &str = "\
Exit status: 0 the guest powered off, 3 it reset, 4 its kernel panicked, 5 it was stopped from outside,
6 a vCPU could not go on, 7 who gave its memory has ended, 8 the VMM did what its jail forbids,
9 it took more memory than its limit;
1 an internal error, 2 wrong usage, 10 to 12 KVM, 13 and 14 memory, 15 a jail, 20 to 26 kernel, initrd and
command line, 30 to 35 disks, 40 to 43 networks, 50 the serial port, 60 to 65 imported kernels,
70 to 73 the API and descriptions of VMs, 80 to 83 snapshots, 90 to 98 named VMs, 99 a host that lacks something.
See docs/exit-codes.md.";

impl From<&End> for Exit {
    fn from(end: &End) -> Self {
        match end {
            End::PowerOff => Self::PowerOff,
            End::Reset => Self::Reset,
            End::Panicked => Self::Panicked,
            End::Killed => Self::Killed,
            End::Fault(_) => Self::GuestFault,
            End::MemoryLost => Self::MemoryLost,
        }
    }
}

/// The exit code of an error, and what a user can do about it.
fn judge(error: &MachineError) -> (Exit, Option<String>) {
    let hint = |text: &str| Some(text.to_owned());
    match error {
        MachineError::Config(_) => (Exit::Usage, hint("see 'tranche help run'")),
        MachineError::Kvm(error) => match error {
            KvmError::Missing(_) => (
                Exit::NoKvm,
                hint(
                    "turn on VT-x or AMD-V in the firmware (or nested virtualization in the hypervisor around), then 'modprobe kvm-intel' or 'modprobe kvm-amd'",
                ),
            ),
            KvmError::NotKvm(_) => {
                (Exit::NoKvm, hint("put the node back: 'rm /dev/kvm', then load the module again or restart udev"))
            }
            KvmError::Permission(_) => (
                Exit::KvmPermission,
                hint("join the group that owns it: 'sudo usermod -aG kvm $USER', then log in again"),
            ),
            KvmError::Capability(_) | KvmError::WantedCapability(_) | KvmError::Version(_) => {
                (Exit::KvmCapability, hint("a newer kernel on the host has it"))
            }
            KvmError::Cpus { max, .. } => (Exit::KvmCapability, Some(format!("give --cpus {max} or less"))),
            KvmError::Open(_) | KvmError::Call { .. } => (Exit::Internal, None),
        },
        MachineError::Boot(error) => judge_boot(error),
        MachineError::Disk(error) => (judge_disk(error), error.hint()),
        MachineError::Tap(error) => {
            let exit = if matches!(error, TapError::NoSuchTap(_)) { Exit::NoSuchTap } else { Exit::TapUnusable };
            (exit, error.hint())
        }
        MachineError::Passt(error) => (Exit::NoUserNetwork, error.hint().map(str::to_owned)),
        MachineError::Vhost(error) => (Exit::NoVhost, error.hint().map(str::to_owned)),
        MachineError::Serial { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
            (Exit::Serial, hint("another VM listens there, or it is no socket: give another path"))
        }
        MachineError::Serial { .. } => {
            (Exit::Serial, hint("give a path in a directory that exists and is yours to write to"))
        }
        // It says by itself what to do.
        MachineError::Memory(MemoryError::HugePages { .. }) => (Exit::NoHugePages, None),
        MachineError::NotThere { place, source } => {
            let other = if place.starts_with("net.") { "TAP" } else { "PATH" };
            (judge(source).0, Some(format!("put it back, or give another with --override {place}={other}")))
        }
        MachineError::State(StateError::Incompatible(_)) => {
            (Exit::SnapshotIncompatible, hint("restore it on a host like the one it was saved on"))
        }
        MachineError::Restore(_) => {
            (Exit::SnapshotDamaged, hint("give it the devices that it was saved with: 'tranche snapshot inspect DIR'"))
        }
        MachineError::State(StateError::Cpus { .. } | StateError::Part(_))
        | MachineError::Memory(MemoryError::FileSize { .. } | MemoryError::File(_)) => {
            (Exit::SnapshotDamaged, hint("put its files back as they were: sizes and shapes cannot be changed"))
        }
        MachineError::Memory(MemoryError::Policy { .. }) => (
            Exit::NoMemoryPolicy,
            hint(
                "to lock it, raise 'ulimit -l' (RLIMIT_MEMLOCK); to fill it in advance, give no more than the host has",
            ),
        ),
        MachineError::Memory(_) => (Exit::Internal, hint("give less --memory")),
        MachineError::Host { .. } => {
            (Exit::Internal, hint("look at the limits of open files and threads ('ulimit -a')"))
        }
        MachineError::Cpu(_)
        | MachineError::Acpi(_)
        | MachineError::Pager(_)
        | MachineError::Plug(_)
        | MachineError::Busy(_)
        | MachineError::NotNow { .. } => (Exit::Internal, None),
    }
}

pub fn judge_disk(error: &DiskError) -> Exit {
    match error {
        DiskError::Open { .. } => Exit::DiskUnreadable,
        DiskError::Locked { .. } => Exit::DiskLocked,
        DiskError::Image { .. } | DiskError::LooksLikeQcow2 { .. } => Exit::DiskImage,
        DiskError::BackingNotNamed { .. } | DiskError::NoBacking { .. } | DiskError::BackingFormat { .. } => {
            Exit::DiskBacking
        }
        _ => Exit::DiskUnusable,
    }
}

fn judge_boot(error: &BootError) -> (Exit, Option<String>) {
    let (exit, hint) = match error {
        BootError::ReadKernel { .. } => (
            Exit::KernelUnreadable,
            "check the path of --kernel and its permissions; 'tranche kernel ls' lists what it can name besides",
        ),
        BootError::NotAKernel { .. } => {
            (Exit::NotAKernel, "give a bzImage (such as /boot/vmlinuz) or an ELF vmlinux for x86-64")
        }
        BootError::KernelDamaged { .. } => (Exit::KernelDamaged, "fetch or copy the file again"),
        BootError::KernelDoesNotFit { minimum: Minimum::Never, .. } => {
            (Exit::KernelDoesNotFit, "give a kernel that is linked to lie between 1 MiB and 3 GiB")
        }
        BootError::InitrdDoesNotFit { minimum: Minimum::Never, .. } => (
            Exit::InitrdDoesNotFit,
            "give a smaller initrd: it has to lie below 3 GiB, and where the kernel can reach it",
        ),
        BootError::KernelDoesNotFit { .. } => (Exit::KernelDoesNotFit, "give more --memory"),
        BootError::ReadInitrd { .. } | BootError::InitrdEmpty { .. } => {
            (Exit::InitrdUnreadable, "check the path of --initrd and its permissions")
        }
        BootError::InitrdDoesNotFit { .. } => (Exit::InitrdDoesNotFit, "give more --memory"),
        BootError::CmdlineTooLong { .. } | BootError::CmdlineCharacter { .. } => (Exit::Cmdline, "mend --cmdline"),
        BootError::GuestMemory(_) => return (Exit::Internal, None),
    };
    (exit, Some(hint.to_owned()))
}

/// What a user can do about a host's KVM.
pub fn kvm_hint(error: KvmError) -> (String, Option<String>) {
    let error = MachineError::Kvm(error);
    (one_line(&error), judge(&error).1)
}

/// Prints why a machine could not be built, and tells the exit code.
pub fn report(error: &MachineError) -> Exit {
    let (exit, hint) = judge(error);
    report_with(error, exit, hint)
}

/// Prints what is wrong with imported kernels, and tells the exit code.
pub fn report_kernels(error: &KernelsError) -> Exit {
    let (exit, hint) = super::kernel::judge(error);
    report_with(error, exit, hint)
}

/// Prints what is wrong with named VMs, and tells the exit code.
pub fn report_store(error: &StoreError) -> Exit {
    let exit = match error {
        StoreError::Name(_) => Exit::Usage,
        StoreError::Unknown(_) => Exit::NoSuchVm,
        StoreError::Exists(_) => Exit::VmExists,
        StoreError::Running(_) | StoreError::Busy(_) => Exit::VmBusy,
        StoreError::NotRunning(_) => Exit::VmNotRunning,
        StoreError::Definition { .. } => Exit::VmDefinition,
        StoreError::NoPlace | StoreError::Io { .. } => Exit::VmStore,
    };
    report_with(error, exit, error.hint())
}

/// Prints an error that has been judged in three lines at most, and tells the exit code.
pub fn report_with(error: &dyn Error, exit: Exit, hint: Option<String>) -> Exit {
    let mut text = format!("tranche: error: {error}\n");
    let causes: Vec<String> = std::iter::successors(error.source(), |&e| e.source()).map(ToString::to_string).collect();
    // Names from files get in here, and must not write elsewhere on the terminal.
    if !causes.is_empty() {
        let _ = writeln!(text, "  cause: {}", causes.join(": "));
    }
    if let Some(hint) = hint {
        let _ = writeln!(text, "  hint: {hint}");
    }
    say(&text.replace(|c: char| c.is_control() && c != '\n', "?"));
    exit
}

/// An error with its causes, in one line.
pub fn one_line(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&e| e.source()).map(ToString::to_string);
    std::iter::once(error.to_string()).chain(causes).collect::<Vec<_>>().join(": ")
}

/// Writes to standard output, as far as somebody listens.
pub fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// Text of another process, which may have been taken over: with nothing for a terminal to act on, if one shows it.
#[must_use]
pub fn for_reader(text: &str, is_terminal: bool) -> Cow<'_, str> {
    let acts = |char: char| char.is_control() && !matches!(char, '\n' | '\t');
    if is_terminal && text.contains(acts) { Cow::Owned(text.replace(acts, "\u{fffd}")) } else { Cow::Borrowed(text) }
}

/// Writes to standard error. Nobody is left to tell when that is closed; the exit code still is.
pub fn say(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
