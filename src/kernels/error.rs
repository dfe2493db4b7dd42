//! Why a kernel cannot be imported, found or removed.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::boot::BootError;

#[derive(Debug, Error)]
pub enum KernelsError {
    #[error(
        "'{0}' is no name for a kernel: 1 to 64 characters of a-z, 0-9, '.', '_' and '-', the first a letter or digit"
    )]
    Name(String),
    #[error("there is no imported kernel '{0}'")]
    Unknown(String),
    #[error("there is an imported kernel '{0}' already")]
    Exists(String),
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} cannot be imported", path.display())]
    Unusable { path: PathBuf, source: Flaw },
    #[error("cannot keep imported kernels in {}", path.display())]
    Library { path: PathBuf, source: io::Error },
    #[error("the imported kernel '{name}' is damaged")]
    Damaged { name: String, source: io::Error },
    #[error("there is no place for imported kernels: neither XDG_DATA_HOME nor HOME is set")]
    NoPlace,
}

/// What is wrong with a package or directory.
#[derive(Debug, Error)]
pub enum Flaw {
    #[error("it is neither a Debian package nor a directory")]
    NotAPackage,
    #[error("it is {0}, which is not read here: unpack it, and import the directory")]
    OtherPackage(&'static str),
    #[error("the package is damaged: {0}")]
    Damaged(String),
    #[error("the package is larger than any kernel's: {0}")]
    TooLarge(String),
    #[error("it holds no kernel: neither boot/vmlinuz-RELEASE nor lib/modules/RELEASE/vmlinuz")]
    NoKernel,
    #[error("it holds no kernel of release {0}; there is: {1}")]
    NoSuchRelease(String, String),
    #[error("it holds several kernels: {0}")]
    SeveralKernels(String),
    #[error("it has no modules for the kernel {0} (lib/modules/{0})")]
    NoModules(String),
    #[error("the module {name} cannot be read: {why}")]
    Module { name: String, why: String },
    #[error("the kernel has no driver for {0}, so that no guest could start with it")]
    NoDriver(&'static str),
    #[error("its kernel cannot be used")]
    Kernel(#[source] Box<BootError>),
}

impl KernelsError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Unknown(_) => "'tranche kernel ls' lists those there are".into(),
            Self::Exists(name) => {
                format!("give another name, or --force to replace it, or remove it: tranche kernel rm {name}")
            }
            Self::Unusable { source: Flaw::SeveralKernels(_) | Flaw::NoSuchRelease(..), .. } => {
                "choose one: --release RELEASE".into()
            }
            Self::Unusable { source: Flaw::NotAPackage | Flaw::NoKernel, .. } => {
                "Debian's are called linux-image-VERSION: apt-get download linux-image-cloud-amd64 names the one of now"
                    .into()
            }
            Self::Unusable { source: Flaw::Damaged(_), .. } => "fetch the package again".into(),
            Self::Library { .. } => {
                "look at the directory's permissions and the room on its disk; XDG_DATA_HOME chooses another place"
                    .into()
            }
            Self::Damaged { name, .. } => format!("remove it and import it again: tranche kernel rm {name}"),
            Self::Unusable { .. } => "look for another package or release of the kernel".into(),
            Self::Name(_) => "such as: tranche kernel import PACKAGE.deb debian-12".into(),
            Self::Read { .. } => "check the path and its permissions".into(),
            Self::NoPlace => "set HOME, or XDG_DATA_HOME, to an absolute path".into(),
        }
    }
}
