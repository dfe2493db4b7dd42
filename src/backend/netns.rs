//! Network namespaces: a network of a VM's own, in which its taps may have the names that other VMs' taps have too.

#![expect(unsafe_code, reason = "unshare(2), which is only safe for those namespaces that share no descriptors")]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::str::FromStr;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use thiserror::Error;

/// Where `ip netns add` puts names.
const NAMES: &str = "/run/netns";

/// Which network namespace a VM is to be in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetNamespace {
    /// A new one, where nobody else is.
    New,
    /// One that is there.
    Path(PathBuf),
}

#[derive(Debug, Error)]
pub enum NetNamespaceError {
    #[error("there is no new network namespace to be had")]
    New(#[source] io::Error),
    #[error("cannot go into the network namespace {}", path.display())]
    Enter { path: PathBuf, source: io::Error },
}

impl NetNamespaceError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::New(_) => {
                "it takes root, or user namespaces: kernel.unprivileged_userns_clone, user.max_user_namespaces and \
                 kernel.apparmor_restrict_unprivileged_userns say whether you may"
            }
            Self::Enter { .. } => "'ip netns list' lists those with a name; going into one takes root",
        }
    }
}

impl FromStr for NetNamespace {
    type Err = &'static str;

    /// `new`, a name, or a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" | "." | ".." => Err("say new, the name of a network namespace, or its path"),
            "new" => Ok(Self::New),
            path if path.contains('/') => Ok(Self::Path(path.into())),
            name => Ok(Self::Path(PathBuf::from(NAMES).join(name))),
        }
    }
}

impl From<&NetNamespace> for OsString {
    fn from(namespace: &NetNamespace) -> Self {
        match namespace {
            NetNamespace::New => "new".into(),
            NetNamespace::Path(path) => path.into(),
        }
    }
}

impl NetNamespace {
    /// Moves this process there, which must not have other threads yet.
    ///
    /// # Errors
    /// When the host does not let us.
    pub fn enter(&self) -> Result<(), NetNamespaceError> {
        match self {
            Self::New => enter_new().map_err(NetNamespaceError::New),
            Self::Path(path) => {
                let enter = |file: File| {
                    let kind = Some(LinkNameSpaceType::Network);
                    Ok(move_into_link_name_space(file.as_fd(), kind)?)
                };
                let failed = |source| NetNamespaceError::Enter { path: path.clone(), source };
                File::open(path).and_then(enter).map_err(failed)
            }
        }
    }
}

fn enter_new() -> io::Result<()> {
    match unshare(UnshareFlags::NEWNET) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        entered => return entered,
    }
    // Whoever is root in a user namespace of their own may have networks there. Outside they stay who they are.
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNET)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: users and networks have nothing to do with the table of descriptors.
    Ok(unsafe { unshare_unsafe(flags) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_paths_and_new_ones() {
        assert_eq!("new".parse(), Ok(NetNamespace::New));
        assert_eq!("a1".parse(), Ok(NetNamespace::Path("/run/netns/a1".into())));
        assert_eq!("/proc/1/ns/net".parse(), Ok(NetNamespace::Path("/proc/1/ns/net".into())));
        assert!(["", ".", ".."].iter().all(|text| text.parse::<NetNamespace>().is_err()));
    }

    #[test]
    fn what_is_no_namespace_is_not_entered() {
        for path in ["/nowhere/net", "/dev/null"] {
            let error = NetNamespace::Path(path.into()).enter().unwrap_err();
            assert!(error.to_string().contains(path) && error.hint().contains("ip netns"), "{error}");
        }
    }
}
