//! What can be wrong with what the user asked to boot.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::payload::UnpackError;

/// Why a machine cannot start its kernel. Each variant is a different mistake for the user to mend.
#[derive(Debug, Error)]
pub enum BootError {
    #[error("cannot read the kernel {}", path.display())]
    ReadKernel { path: PathBuf, source: io::Error },
    #[error("{} is not a kernel that can be started", path.display())]
    NotAKernel { path: PathBuf, source: Flaw },
    #[error("the kernel {} is damaged", path.display())]
    KernelDamaged { path: PathBuf, source: Flaw },
    #[error("the kernel {} does not fit into {memory_mib} MiB of memory: {minimum}", path.display())]
    KernelDoesNotFit { path: PathBuf, memory_mib: u64, minimum: Minimum },
    #[error("cannot read the initrd {}", path.display())]
    ReadInitrd { path: PathBuf, source: io::Error },
    #[error("the initrd {} is empty", path.display())]
    InitrdEmpty { path: PathBuf },
    #[error("the initrd {} does not fit into {memory_mib} MiB of memory beside the kernel: {minimum}", path.display())]
    InitrdDoesNotFit { path: PathBuf, memory_mib: u64, minimum: Minimum },
    /// Lengths in bytes, without the final NUL.
    #[error("the kernel command line has {length} bytes; this kernel takes at most {limit}")]
    CmdlineTooLong { length: usize, limit: usize },
    #[error("the kernel command line contains {what}")]
    CmdlineCharacter { what: &'static str },
    /// Not a mistake of the user's: the machine's memory map and ours disagree.
    #[error("cannot write the boot data into guest memory")]
    GuestMemory(#[from] vm_memory::GuestMemoryError),
}

/// What is wrong with a kernel file.
#[derive(Debug, Error)]
pub enum Flaw {
    #[error("it is neither an ELF file nor a bzImage")]
    UnknownFormat,
    #[error("its ELF header is not that of a 64-bit x86 executable")]
    ForeignElf,
    #[error("it is a program or library for a running system")]
    Program,
    #[error("it has nothing to load")]
    NothingToLoad,
    #[error("its boot protocol is {}.{:02}; 2.08 is the oldest supported", .0 >> 8, .0 & 0xff)]
    OldProtocol(u16),
    #[error("it ends after {actual} bytes; its headers speak of {expected}")]
    Truncated { expected: u64, actual: u64 },
    #[error("its program headers make no sense")]
    ProgramHeaders,
    #[error("its entry point {0:#x} is outside of what it loads")]
    EntryPoint(u64),
    #[error("its compressed payload cannot be unpacked")]
    Payload(#[source] UnpackError),
}

impl Flaw {
    /// Whether the file was a kernel once, rather than never.
    fn is_damage(&self) -> bool {
        match self {
            Self::UnknownFormat | Self::ForeignElf | Self::Program | Self::NothingToLoad | Self::OldProtocol(_) => {
                false
            }
            Self::Payload(cause) => !matches!(cause, UnpackError::UnknownFormat),
            Self::Truncated { .. } | Self::ProgramHeaders | Self::EntryPoint(_) => true,
        }
    }
}

/// A failure to make sense of a kernel, before it is known whose file it was.
#[derive(Debug)]
pub(super) enum KernelError {
    Read(io::Error),
    Flaw(Flaw),
}

impl KernelError {
    pub fn of(self, path: &Path) -> BootError {
        let path = path.to_owned();
        match self {
            Self::Read(source) => BootError::ReadKernel { path, source },
            Self::Flaw(source) if source.is_damage() => BootError::KernelDamaged { path, source },
            Self::Flaw(source) => BootError::NotAKernel { path, source },
        }
    }
}

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

impl From<Flaw> for KernelError {
    fn from(flaw: Flaw) -> Self {
        Self::Flaw(flaw)
    }
}

/// The least guest memory that something needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Minimum {
    Mib(u64),
    /// No amount of memory helps: it has to lie where no RAM can be.
    Never,
}

impl fmt::Display for Minimum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mib(mib) => write!(f, "it takes at least {mib} MiB"),
            Self::Never => f.write_str("no amount of memory makes room for it where it has to be"),
        }
    }
}
