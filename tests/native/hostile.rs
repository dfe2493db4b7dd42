//! A guest that attacks every device, over both transports: what it may break is its own device until the next reset.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::{TempDir, tempdir_in};

use crate::guest::{guest, started};
use crate::support::{Running, not_tested};

/// The guest's own time limits are shorter; on a busy machine it takes long.
const LIMIT: Duration = Duration::from_secs(300);

/// What the VMM may have grown to besides guest memory, in KiB: it starts with some 2 MiB.
const MOST_MEMORY: u64 = 16 << 10;

/// Lines on standard error: ten a minute from each place that warns, of which there are fewer than this.
const PLACES_THAT_WARN: usize = 12;

/// A tap in a network of its own, if that can be had.
struct Net(String);

impl Net {
    fn new(name: &str) -> Option<Self> {
        let net = Self(format!("tr-{name}-{}", std::process::id()));
        let made = ip(&["netns", "add", &net.0])
            && ip(&["-n", &net.0, "tuntap", "add", "hostile", "mode", "tap"])
            && ip(&["-n", &net.0, "link", "set", "hostile", "up"]);
        if !made {
            not_tested("a hostile guest's network card: there is no permission for a tap");
        }
        made.then_some(net)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.0]);
    }
}

fn ip(args: &[&str]) -> bool {
    Command::new("ip").args(args).output().is_ok_and(|output| output.status.success())
}

struct Bench {
    dir: TempDir,
    net: Option<Net>,
}

impl Bench {
    fn new(name: &str) -> Self {
        let dir = tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for disk in ["attacked", "neighbour"] {
            std::fs::write(dir.path().join(disk), vec![0xa5; 1 << 20]).unwrap();
        }
        Self { dir, net: Net::new(name) }
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, transport: &str, cmdline: &str) -> Command {
        let mut command = guest("hostile", &format!("transport={transport} {cmdline}"));
        command.args(["--transport", transport, "--memory", "64M", "--cpus", "2"]);
        command.arg("--disk").arg(self.disk("attacked")).arg("--disk").arg(self.disk("neighbour"));
        let Some(net) = &self.net else { return command };
        command.args(["--net", "tap=hostile"]);
        let mut within = Command::new("ip");
        within.args(["netns", "exec", &net.0]).arg(command.get_program()).args(command.get_args());
        within
    }
}

/// Private memory of a process that is not the guest's, in KiB: the guest's is the largest mapping.
fn memory(pid: u32) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in smaps.lines() {
        let number = |text: &str| text.trim().trim_end_matches(" kB").parse().unwrap();
        match line.split_once(':') {
            Some(("Size", size)) => mappings.push((number(size), 0)),
            Some(("Private_Dirty", size)) => mappings.last_mut().unwrap().1 = number(size),
            _ => {}
        }
    }
    let largest = mappings.iter().map(|mapping| mapping.0).max().unwrap();
    mappings.iter().filter(|mapping| mapping.0 != largest).map(|mapping| mapping.1).sum()
}

fn names(path: &Path) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

/// Runs all attacks; the guest stays afterwards, so that the VMM can be looked at.
fn survives(transport: &str, cmdline: &str) {
    let bench = Bench::new(transport);
    let mut command = bench.command(transport, &format!("cpus=2 end=halt {cmdline}"));
    let running = Running::start(&mut command);
    running.output.wait_for("neighbour\n", LIMIT);
    // `ip netns exec` becomes the program.
    let pid = running.vmm();
    let (memory_before, files) = (memory(pid), names(Path::new(&format!("/proc/{pid}/fd"))));
    running.output.wait_for(" failed\n", LIMIT);
    let grown = memory(pid).saturating_sub(memory_before);
    assert!(grown < MOST_MEMORY, "the VMM has grown by {grown} KiB");
    // A queue that runs has a descriptor more, and the guest leaves all its devices running.
    let more = names(Path::new(&format!("/proc/{pid}/fd"))).saturating_sub(files);
    assert!(more <= 8, "{more} more descriptors");

    // It still takes signals: the first is the power button, which this guest ignores. Two kinds, as two of the same
    // may come as one.
    running.signal(Signal::TERM);
    running.signal(Signal::INT);
    let ended = running.wait(LIMIT).expect_code(5);
    let report = ended.output;
    assert!(report.contains(" ok, 0 failed\n") && !report.contains("FAIL"), "{report}");
    let devices = if bench.net.is_some() { &["block", "net", "rng"][..] } else { &["block", "rng"] };
    for device in devices {
        for attack in [
            "loop-of-one needs-reset",
            "wrapping needs-reset",
            "rings-nowhere needs-reset",
            "random-rings survived",
            "register-noise survived",
            "reset-under-way survived",
            "two-cpus survived",
        ] {
            assert!(report.contains(&format!("ok {device} {attack}\n")), "{device} {attack}:\n{report}");
        }
        let pci = report.contains(&format!("ok {device} bar-moves survived\n"))
            && report.contains(&format!("ok {device} msix-nonsense survived\n"));
        assert_eq!(pci, transport == "pci", "{report}");
    }
    let lines = ended.errors.lines().count();
    let minutes = 2 + LIMIT.as_secs() as usize / 60;
    assert!(lines < PLACES_THAT_WARN * 11 * minutes && ended.errors.len() < 100 * 1024, "{}", ended.errors);
    assert!(!ended.errors.contains("panicked"), "{}", ended.errors);
    // Nobody wrote to the disk that was not attacked.
    assert_eq!(std::fs::read(bench.disk("neighbour")).unwrap(), vec![0xa5; 1 << 20]);
}

#[test]
fn every_attack_over_pci_and_on_the_platform() {
    survives("pci", "platform=1");
}

#[test]
fn every_attack_over_mmio() {
    survives("mmio", "");
}

/// The guest's own end, after a single attack, is an ordinary one.
#[test]
fn an_attacker_can_power_off() {
    let bench = Bench::new("off");
    let running = started(&mut bench.command("pci", "attack=bar-moves"), "\ndone: ");
    running.wait(LIMIT).expect_code(0);
}
