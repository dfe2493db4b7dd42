//! A jail as it is seen from outside, in /proc (proc(5)): what the kernel says of the process, not what the process says.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use super::cgroup;

/// What the kernel tells of a process. Some of it only root gets to see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Seen {
    pub pid: u32,
    /// The user that it is on the host.
    pub user: Option<u32>,
    /// Namespaces that are not ours, as far as we may know.
    pub namespaces: Vec<&'static str>,
    /// Of its permitted and its bounding set, in hexadecimal.
    pub capabilities: Option<String>,
    pub no_new_privileges: bool,
    /// What the host's security module has it for: AppArmor's profile, SELinux's context, Smack's label.
    pub label: Option<String>,
    /// May others of the same user look into its memory?
    pub dumpable: bool,
    /// The one that is its own, and what it may take; none if it is in somebody else's.
    pub cgroup: Option<String>,
    pub cgroup_limits: BTreeMap<&'static str, String>,
    pub threads: usize,
    /// Threads whose system calls are filtered.
    pub filtered_threads: usize,
}

const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// Looks at a process; nothing if there is none.
#[must_use]
pub fn look_at(pid: u32) -> Option<Seen> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = |key| value(&status, key);
    let user = value("Uid").and_then(|ids| ids.split_whitespace().next()?.parse().ok());
    let read = |path: String| fs::read_to_string(path).ok();
    let differs = |name: &'static str| {
        let link = |who: &str| fs::read_link(format!("/proc/{who}/ns/{name}")).ok();
        match (link("self"), link(&pid.to_string())) {
            (Some(ours), Some(theirs)) => ours != theirs,
            // Two of them are seen by anybody.
            _ if name == "user" => read(format!("/proc/{pid}/uid_map")) != read("/proc/self/uid_map".into()),
            _ if name == "pid" => value("NSpid").is_some_and(|pids| pids.split_whitespace().count() > 1),
            _ => false,
        }
    };
    let (cgroup, cgroup_limits) = cgroup::look_at(pid).unzip();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let tasks: Vec<_> = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok()).collect();
    Some(Seen {
        pid,
        user,
        namespaces: NAMESPACES.into_iter().filter(|&name| differs(name)).collect(),
        capabilities: value("CapPrm")
            .zip(value("CapBnd"))
            .map(|(permitted, bounding)| format!("{permitted} {bounding}")),
        label: read(format!("/proc/{pid}/attr/current"))
            .map(|label| label.trim_end_matches(['\n', '\0']).to_owned())
            .filter(|label| !label.is_empty()),
        no_new_privileges: value("NoNewPrivs") == Some("1"),
        // Else its files in /proc belong to root.
        dumpable: fs::metadata(format!("/proc/{pid}/status")).ok().map(|of| of.uid()) == user,
        cgroup,
        cgroup_limits: cgroup_limits.unwrap_or_default(),
        threads: tasks.len(),
        filtered_threads: tasks.iter().filter(|task| self::value(task, "Seccomp") == Some("2")).count(),
    })
}

fn value<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_in_no_jail() {
        let seen = look_at(std::process::id()).unwrap();
        assert_eq!(seen.user, Some(rustix::process::getuid().as_raw()));
        assert!(seen.namespaces.is_empty() && seen.threads > 0 && seen.filtered_threads == 0, "{seen:?}");
        assert_eq!(look_at(u32::MAX), None);
    }
}
