//! What the program is when it is called `jailer`: Firecracker's jailer, for agents that start VMs with it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use rustix::process::Resource;
use rustix::time::{ClockId, clock_gettime};

use super::exit;
use super::vmm::instance_id;
use crate::control::FIRECRACKER_VERSION;
use crate::jail::chroot::{CgroupConfig, ChrootConfig, become_jailed};

/// Open files that a VMM may have, if nobody says anything else.
const OPEN_FILES: u64 = 2048;

/// Is this name of the program one that asks for this personality?
#[must_use]
pub fn is_wanted(name: Option<&OsStr>) -> bool {
    name.map(Path::new).and_then(Path::file_name) == Some(OsStr::new("jailer"))
}

/// Starts a VMM in a root directory of its own, as an ordinary user; it takes root.
#[derive(Debug, Parser)]
#[command(name = "jailer", disable_version_flag = true)]
struct JailerArgs {
    /// The VM's id
    #[arg(long, value_parser = instance_id, required_unless_present = "version")]
    id: Option<String>,
    /// The VMM: a regular file whose name contains 'firecracker'
    #[arg(long, value_name = "FILE", required_unless_present = "version")]
    exec_file: Option<PathBuf>,
    /// The user that it becomes
    #[arg(long, required_unless_present = "version")]
    uid: Option<u32>,
    /// The group that it becomes
    #[arg(long, required_unless_present = "version")]
    gid: Option<u32>,
    /// What root directories are made below
    #[arg(long, value_name = "DIR", default_value = "/srv/jailer")]
    chroot_base_dir: PathBuf,
    /// The network namespace that it joins
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Let go of the terminal
    #[arg(long)]
    daemonize: bool,
    /// In a PID namespace of its own
    #[arg(long)]
    new_pid_ns: bool,
    /// Write a value to a file of its cgroup; may be repeated
    #[arg(long, value_name = "FILE=VALUE", value_parser = a_cgroup_file)]
    cgroup: Vec<(String, String)>,
    /// Which cgroups
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    cgroup_version: u8,
    /// The cgroup that its own is made below; the VMM's name by default
    #[arg(long, value_name = "PATH", value_parser = a_cgroup_path)]
    parent_cgroup: Option<PathBuf>,
    /// Limit a resource: fsize=BYTES or no-file=N; may be repeated
    #[arg(long, value_name = "RESOURCE=N", value_parser = a_limit)]
    resource_limit: Vec<Limit>,
    /// Print the version
    #[arg(long, short = 'V')]
    version: bool,
    /// What the VMM is given
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

#[derive(Debug, Clone, Copy)]
struct Limit(Resource, u64);

fn a_limit(text: &str) -> Result<Limit, String> {
    let (name, value) = text.split_once('=').ok_or("a resource and a number, with '=' between")?;
    let value = value.parse().map_err(|_| format!("{value} is no number"))?;
    match name {
        "fsize" => Ok(Limit(Resource::Fsize, value)),
        "no-file" => Ok(Limit(Resource::Nofile, value)),
        _ => Err("the resources are fsize and no-file".into()),
    }
}

fn a_cgroup_file(text: &str) -> Result<(String, String), &'static str> {
    let (file, value) = text.split_once('=').ok_or("a file and a value, with '=' between")?;
    let is_file = file.contains('.') && !file.contains('/') && !file.starts_with('.');
    if is_file && !value.is_empty() {
        Ok((file.into(), value.into()))
    } else {
        Err("a file such as cpu.shares, and a value")
    }
}

fn a_cgroup_path(text: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(text);
    let is_below = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if is_below && !text.is_empty() { Ok(path) } else { Err("a relative path without '..'") }
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    // What the VMM is to add its own to: when it was started, and what that has cost by then.
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros());
    let args = match JailerArgs::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    if args.version {
        exit::print(&format!("Jailer v{FIRECRACKER_VERSION}\n\nTranche {}\n", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
    }
    let (Some(id), Some(program), Some(user), Some(group)) = (args.id, args.exec_file, args.uid, args.gid) else {
        return ExitCode::FAILURE;
    };
    let cpu_time = clock_gettime(ClockId::ProcessCPUTime);
    let cpu_time = cpu_time.tv_sec * 1_000_000 + cpu_time.tv_nsec / 1000;
    let own = [
        ("--id", id.clone()),
        ("--start-time-us", started.to_string()),
        ("--start-time-cpu-us", cpu_time.to_string()),
        ("--parent-cpu-time-us", cpu_time.to_string()),
    ];
    let own = own.into_iter().flat_map(|(option, value)| [OsString::from(option), value.into()]);
    let mut limits = vec![(Resource::Nofile, OPEN_FILES)];
    limits.extend(args.resource_limit.iter().map(|limit| (limit.0, limit.1)));
    let config = ChrootConfig {
        id,
        program,
        user,
        group,
        base: args.chroot_base_dir,
        net_namespace: args.netns,
        daemonize: args.daemonize,
        pid_namespace: args.new_pid_ns,
        limits,
        cgroup: CgroupConfig { version: args.cgroup_version, parent: args.parent_cgroup, files: args.cgroup },
        arguments: own.chain(args.arguments).collect(),
    };
    match become_jailed(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            exit::say(&format!("Jailer error: {}\n", exit::one_line(&error)));
            ExitCode::FAILURE
        }
    }
}
