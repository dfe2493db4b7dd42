//! `tranche doctor`: what this host has for VMs, what it lacks, and what to do about it.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use serde::Serialize;

use super::exit::{self, Exit};
use super::table::{Format, Table};
use crate::backend::OpenDirectly;
use crate::config::Share;
use crate::jail::{self, Cgroup, Layer, kernel_version, landlock_version};
use crate::machine::look_at_kvm;
use crate::store::Store;

/// Say what this host has for VMs, what it lacks, and what to do about it
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 VMs can run here, 99 they cannot (with --jail: not in a strict one); what is only of use does not count."
)]
pub struct DoctorArgs {
    /// Do what can be done about it: load modules, join the group of /dev/kvm. It takes root
    #[arg(long)]
    fix: bool,

    /// Say which layers of a VM's jail this host allows
    #[arg(long, conflicts_with = "fix")]
    jail: bool,

    /// How to print it
    #[arg(long, default_value = "table")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// VMs run; something that they could have is not there.
    Missing,
    /// No VM runs.
    Fail,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::Fail => "FAIL",
        }
    }
}

/// What was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it.
    advice: Option<String>,
    /// A command that does it.
    #[serde(skip)]
    fix: Option<Vec<&'static str>>,
}

impl Finding {
    fn new(what: &'static str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { what, verdict, found: found.into(), advice: None, fix: None }
    }

    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    fn fix(mut self, command: &[&'static str]) -> Self {
        self.fix = Some(command.to_vec());
        self
    }

    /// What is not there is not only missed.
    fn needed(self) -> Self {
        if self.verdict == Verdict::Missing { Self { verdict: Verdict::Fail, ..self } } else { self }
    }

    /// There, or only missed.
    fn of(what: &'static str, there: bool, found: impl Into<String>, advice: &str) -> Self {
        let verdict = if there { Verdict::Ok } else { Verdict::Missing };
        let finding = Self::new(what, verdict, found);
        if there { finding } else { finding.advise(advice) }
    }
}

pub fn run(args: &DoctorArgs) -> ExitCode {
    let mut findings = if args.jail { examine_jail() } else { examine() };
    if args.fix && fix(&findings) {
        findings = examine();
    }
    match args.format {
        Format::Json => exit::print(&format!("{:#}\n", serde_json::json!(findings))),
        Format::Table => exit::print(&table(&findings)),
    }
    let fits = findings.iter().all(|finding| finding.verdict != Verdict::Fail);
    if fits { ExitCode::SUCCESS } else { ExitCode::from(Exit::HostUnfit as u8) }
}

/// Each layer of a jail, tried.
fn examine_jail() -> Vec<Finding> {
    let missing = match jail::examine() {
        Ok(missing) => missing,
        Err(error) => {
            let hint = error.hint().unwrap_or("see docs/jail.md");
            return vec![Finding::new("jail", Verdict::Fail, exit::one_line(&error)).advise(hint)];
        }
    };
    let layer = |layer: Layer, found: String, advice: &str| {
        let why = missing.iter().find(|missing| missing.0 == layer).map(|missing| missing.1.clone());
        let is_there = why.is_none();
        // A strict jail, which VMs have by default, has all of them.
        Finding::of(layer.name(), is_there, why.unwrap_or(found), advice).needed()
    };
    let landlock = landlock_version().unwrap_or(0);
    let restricts = match landlock {
        0 => "nothing",
        1..4 => "files",
        4..6 => "files, TCP ports",
        _ => "files, TCP ports, abstract sockets, signals",
    };
    vec![
        layer(
            Layer::Namespaces,
            "user, mount, PID, network, IPC, UTS, cgroup".into(),
            "kernel.unprivileged_userns_clone=1, user.max_user_namespaces above 0, \
             kernel.apparmor_restrict_unprivileged_userns=0 (docs/jail.md)",
        ),
        layer(Layer::EmptyRoot, "nothing in it, read-only".into(), "it takes a mount namespace"),
        Finding::new("user", Verdict::Ok, "an ordinary one, without capabilities or new privileges; not dumpable"),
        match Cgroup::make(&Share::default()) {
            Ok(cgroup) => Finding::new("cgroup", Verdict::Ok, cgroup.controllers().join(", ")),
            // A strict jail does without, and says so only to who wants limits of CPU time or memory.
            Err(error) => Finding::new("cgroup", Verdict::Missing, error.to_string()).advise(error.hint()),
        },
        Finding::new("limits", Verdict::Ok, "threads, address space; no core dumps, no message queues"),
        layer(Layer::Profile, profile(), "load resources/apparmor/tranche as a whole (docs/jail.md)"),
        layer(
            Layer::Landlock,
            format!("version {landlock}: {restricts}"),
            "boot with 'lsm=landlock,...' on Linux 5.13 or newer",
        ),
        seccomp(),
    ]
}

/// What a security module of the host's has the program for: a VMM gets a narrower profile below ours.
fn profile() -> String {
    match read("/proc/self/attr/apparmor/current") {
        Some(label) if label != "unconfined" => format!("AppArmor: {label}"),
        _ => "none of AppArmor; the jail does without (docs/jail.md)".into(),
    }
}

fn seccomp() -> Finding {
    let is_there = read("/proc/sys/kernel/seccomp/actions_avail").is_some_and(|actions| actions.contains("trap"));
    let found = if is_there { "a policy for each kind of thread: main, vcpu, api, io" } else { "not in this kernel" };
    Finding::of("seccomp", is_there, found, "a kernel with CONFIG_SECCOMP_FILTER").needed()
}

fn table(findings: &[Finding]) -> String {
    let mut table = Table::new(&["WHAT", "IS", "FOUND"]);
    for finding in findings {
        table.row([finding.what, finding.verdict.name(), &finding.found]);
        if let Some(advice) = &finding.advice {
            table.row(["", "", &format!("-> {advice}")]);
        }
    }
    table.to_string()
}

/// Runs what helps; `true` if something was run.
fn fix(findings: &[Finding]) -> bool {
    let commands: Vec<_> = findings.iter().filter_map(|finding| finding.fix.as_ref()).collect();
    if !commands.is_empty() && !rustix::process::geteuid().is_root() {
        for command in commands {
            exit::say(&format!("tranche: as root: {}\n", command.join(" ")));
        }
        return false;
    }
    for command in &commands {
        exit::say(&format!("tranche: {}\n", command.join(" ")));
        match Command::new(command[0]).args(&command[1..]).status() {
            Ok(status) if status.success() => {}
            Ok(status) => exit::say(&format!("tranche: {}: {status}\n", command[0])),
            Err(error) => exit::say(&format!("tranche: cannot run {}: {error}\n", command[0])),
        }
    }
    !commands.is_empty()
}

/// A file of /proc or /sys, without the white space around it.
fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn examine() -> Vec<Finding> {
    vec![
        versions(),
        cpu(),
        kvm(),
        device("taps", "/dev/net/tun", "tun", "for --net tap=..."),
        device("vhost-net", "/dev/vhost-net", "vhost_net", "for --net tap=...,vhost=on"),
        program("passt", &["--version"], "for --net user: install passt"),
        tools(),
        user_namespaces(),
        cgroups(),
        landlock(),
        io_uring(),
        userfaultfd(),
        huge_pages(),
        same_pages(),
        limits(),
        places(),
    ]
}

fn versions() -> Finding {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    let found = format!("Tranche {} on Linux {release}", env!("CARGO_PKG_VERSION"));
    Finding::of("versions", kernel_version() >= (5, 10), found, "Linux 5.10 is the oldest that is tested")
}

fn cpu() -> Finding {
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Finding::new("CPU", Verdict::Ok, "VT-x"),
        (_, true) => Finding::new("CPU", Verdict::Ok, "AMD-V"),
        // KVM itself has the last word.
        _ => Finding::new("CPU", Verdict::Missing, "neither VT-x nor AMD-V")
            .advise("turn it on in the firmware, or nested virtualization in the hypervisor around"),
    }
}

fn kvm() -> Finding {
    match look_at_kvm(&OpenDirectly) {
        Ok(cpus) => Finding::new("KVM", Verdict::Ok, format!("all that a VM needs, and up to {cpus} vCPUs in one")),
        Err(error) => {
            let (found, hint) = exit::kvm_hint(error);
            let finding = Finding { advice: hint, ..Finding::new("KVM", Verdict::Fail, found) };
            let intel = read("/proc/cpuinfo").is_some_and(|info| info.contains(" vmx"));
            match Path::new("/dev/kvm").exists() {
                true => finding,
                false => finding.fix(&["modprobe", if intel { "kvm_intel" } else { "kvm_amd" }]),
            }
        }
    }
}

fn device(what: &'static str, path: &'static str, module: &'static str, purpose: &str) -> Finding {
    match File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::new(what, Verdict::Ok, path),
        Err(error) => {
            let finding = Finding::new(what, Verdict::Missing, format!("{path}: {error}"));
            let advice = match error.kind() {
                std::io::ErrorKind::PermissionDenied => format!("{purpose}: let your group read and write it"),
                _ => format!("{purpose}: modprobe {module}"),
            };
            match module {
                "tun" => finding.advise(advice).fix(&["modprobe", "tun"]),
                _ => finding.advise(advice).fix(&["modprobe", "vhost_net"]),
            }
        }
    }
}

fn program(what: &'static str, args: &[&str], advice: &str) -> Finding {
    let output = Command::new(what).args(args).stdin(Stdio::null()).output();
    let version = output.ok().map(|output| {
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(60).collect::<String>()
    });
    Finding::of(what, version.is_some(), version.unwrap_or_else(|| "not installed".into()), advice)
}

fn tools() -> Finding {
    let there =
        ["e2fsck", "resize2fs"].map(|name| ["/usr/sbin", "/sbin"].iter().any(|dir| Path::new(dir).join(name).exists()));
    let found = if there == [true; 2] { "e2fsck, resize2fs" } else { "not installed" };
    Finding::of("e2fsprogs", there == [true; 2], found, "for 'tranche resize' of what is on disks: install e2fsprogs")
}

fn user_namespaces() -> Finding {
    let forbidden = [
        ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=10000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ];
    let by = forbidden.iter().find(|(path, value, _)| read(path).as_deref() == Some(value));
    let there = Path::new("/proc/self/ns/user").exists() && by.is_none();
    let advice = by.map_or("a kernel with CONFIG_USER_NS has them".into(), |(.., setting)| format!("sysctl {setting}"));
    let found = if there { "for everybody" } else { "not for ordinary users" };
    Finding::of("namespaces", there, found, &format!("for clones with networks of their own, without root: {advice}"))
}

fn cgroups() -> Finding {
    match read("/sys/fs/cgroup/cgroup.controllers") {
        Some(controllers) => Finding::new("cgroups", Verdict::Ok, format!("v2: {controllers}")),
        None => Finding::new("cgroups", Verdict::Missing, "no cgroup v2 at /sys/fs/cgroup")
            .advise("for --cpu-limit, --cpu-weight and --memory-limit: boot with systemd.unified_cgroup_hierarchy=1"),
    }
}

fn landlock() -> Finding {
    let version = landlock_version();
    let found = version.map_or("none".into(), |version| format!("version {version}"));
    let advice = "for 'tranche resize' of what is on disks: boot with lsm=landlock,... (Linux 5.13 or later)";
    Finding::of("Landlock", version.is_some(), found, advice)
}

fn io_uring() -> Finding {
    let disabled = read("/proc/sys/kernel/io_uring_disabled").unwrap_or_else(|| "0".into());
    let root = rustix::process::geteuid().is_root();
    let there = disabled == "0" || disabled == "1" && root;
    let found = if there { "allowed" } else { "forbidden: disks do one request of a queue at a time" };
    Finding::of("io_uring", there, found, "sysctl kernel.io_uring_disabled=0")
}

fn userfaultfd() -> Finding {
    let for_all = read("/proc/sys/vm/unprivileged_userfaultfd").as_deref() == Some("1");
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").is_ok();
    let there = for_all || device || rustix::process::geteuid().is_root();
    let found = if there { "allowed" } else { "only for faults of programs" };
    let advice = "for snapshots whose memory another process gives: let your group read and write /dev/userfaultfd";
    Finding::of("userfaultfd", there, found, advice)
}

fn huge_pages() -> Finding {
    let of = |file: &str| read(&format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}"));
    let free: u64 = of("free_hugepages").and_then(|count| count.parse().ok()).unwrap_or(0);
    let transparent = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_else(|| "none".into());
    let chosen = transparent.split(['[', ']']).nth(1).unwrap_or("none").to_owned();
    let found = format!("transparent: {chosen}; reserved and free: {free} of 2 MiB");
    let advice = "transparent ones: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; for hugepages=on: sysctl vm.nr_hugepages=N";
    Finding::of("huge pages", ["always", "madvise"].contains(&&*chosen), found, advice)
}

fn same_pages() -> Finding {
    let runs = read("/sys/kernel/mm/ksm/run").as_deref() == Some("1");
    let found = if runs { "KSM runs" } else { "KSM does not run" };
    Finding::of("same pages", runs, found, "for --memory-policy mergeable: echo 1 > /sys/kernel/mm/ksm/run")
}

fn limits() -> Finding {
    let of = |resource| rustix::process::getrlimit(resource).current;
    let (files, locked) = (of(rustix::process::Resource::Nofile), of(rustix::process::Resource::Memlock));
    let say = |limit: Option<u64>| limit.map_or("unlimited".into(), |limit| limit.to_string());
    let found = format!("open files {}, locked memory {} bytes", say(files), say(locked));
    Finding::of("limits", files.is_none_or(|files| files >= 1024), found, "ulimit -n 1024 or more")
}

fn places() -> Finding {
    match Store::of_user().and_then(|store| store.all()) {
        Ok(vms) => {
            let dead = vms.iter().filter(|vm| ["dead", "failed"].contains(&vm.state().name())).count();
            Finding::new("VMs", Verdict::Ok, format!("{} named ones, {dead} of which ended badly", vms.len()))
        }
        Err(error) => {
            let advice = error.hint().unwrap_or_else(|| "set HOME or XDG_STATE_HOME".into());
            Finding::new("VMs", Verdict::Missing, exit::one_line(&error)).advise(advice)
        }
    }
}
