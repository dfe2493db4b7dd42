//! The profile that a security module of the host's has for a VMM, if an administrator has loaded ours: AppArmor's and
//! TOMOYO's in `resources/`. It is one below the profile that the program runs under, so a VMM that is not jailed has no more
//! than that.
//!
//! What leads there is opened while there are files, and used when all that takes more rights is done.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open, openat};

/// What our profile for the program is called. Another one that it runs under (of a container, or what has a host restrict
/// user namespaces) has none for VMMs below it.
const PROGRAM: &str = "tranche";

/// What a VMM's profile is called, below its program's.
const NAME: &str = "vmm";

/// The way to a narrower profile.
#[derive(Debug, Default)]
pub struct Profiles {
    /// This process's `/proc/self/attr/apparmor`, and the profile that it is to have.
    apparmor: Option<(OwnedFd, String)>,
    /// `/sys/kernel/security/tomoyo/self_domain`.
    tomoyo: Option<File>,
}

impl Profiles {
    /// Looks for what the host has.
    #[must_use]
    pub fn find() -> Self {
        Self { apparmor: apparmor(), tomoyo: tomoyo() }
    }

    /// Goes over to the VMM's profiles.
    ///
    /// # Errors
    /// When AppArmor has our profile for the program, but none for its VMMs. Of TOMOYO, nobody can tell whether it was meant
    /// to.
    pub fn enter(self) -> io::Result<()> {
        if let Some((attributes, profile)) = self.apparmor {
            // Opened only now, as it has to be by the user that this has become.
            let mut file = File::from(openat(&attributes, "current", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?);
            file.write_all(format!("changeprofile {profile}").as_bytes())?;
        }
        // It lets nothing be opened any more.
        if let Some(mut tomoyo) = self.tomoyo {
            let _ = tomoyo_transition(&mut tomoyo);
        }
        Ok(())
    }
}

fn apparmor() -> Option<(OwnedFd, String)> {
    const DIR: &str = "/proc/self/attr/apparmor";
    let label = fs::read_to_string(format!("{DIR}/current")).ok()?;
    let profile = vmm_profile(label.trim_end_matches(['\n', '\0']))?;
    let dir = open(DIR, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    Some((dir, profile))
}

/// Of a label such as `tranche (enforce)`.
fn vmm_profile(label: &str) -> Option<String> {
    let (profile, mode) = label.rsplit_once(" (")?;
    let is_ours = profile == PROGRAM && ["enforce)", "complain)", "kill)"].contains(&mode);
    is_ours.then(|| format!("{profile}//{NAME}"))
}

fn tomoyo() -> Option<File> {
    File::options().read(true).write(true).open("/sys/kernel/security/tomoyo/self_domain").ok()
}

fn tomoyo_transition(file: &mut File) -> io::Result<()> {
    let mut domain = String::new();
    file.read_to_string(&mut domain)?;
    // Where our policy is not loaded, there is no such way to go.
    file.write_all(format!("{} //{NAME}\n", domain.trim()).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_one_below_the_programs() {
        assert_eq!(vmm_profile("tranche (enforce)"), Some("tranche//vmm".into()));
        assert_eq!(vmm_profile("tranche (complain)"), Some("tranche//vmm".into()));
        let others = ["docker-default (enforce)", "unprivileged_userns (enforce)", "tranche//vmm (enforce)"];
        for label in
            ["unconfined", "", "tranche (unconfined)", "system_u:system_r:unconfined_t:s0"].into_iter().chain(others)
        {
            assert_eq!(vmm_profile(label), None, "{label}");
        }
    }
}
