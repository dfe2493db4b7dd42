//! `tranche stats` and `tranche top`: what named VMs take of the host, now.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::failure::{Failure, conclude};
use super::lifecycle::{ask_text, seconds};
use crate::cli::exit;
use crate::cli::table::{Format, Table};
use crate::cli::terminal::RawTerminal;
use crate::config::MemorySize;
use crate::store::{Store, StoreError, Vm};

/// Show what named VMs take of the host
///
/// CPU and steal (time that vCPUs wanted to run and could not) are in percent of one CPU. Memory: what the guest has, what of it the
/// host holds for it, what of the process is shared with others, and what the process needs besides. Rates are per second.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct StatsArgs {
    /// One VM; without, all that run
    name: Option<String>,

    /// How long to look, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    interval: Duration,

    /// How to print them
    #[arg(long, default_value = "table")]
    format: Format,
}

/// Show what named VMs take of the host, as it changes; 'q' ends it
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct TopArgs {
    /// How often to look, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    interval: Duration,
}

/// What a VM has taken by a moment.
#[derive(Debug, Clone, Default)]
struct Sample {
    pid: u32,
    /// Of all its threads.
    cpu: Duration,
    /// That vCPUs were ready to run and had no CPU.
    stolen: Duration,
    counts: BTreeMap<String, u64>,
    guest: u64,
    resident: u64,
    shared: u64,
    overhead: u64,
}

/// What it takes per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Usage {
    name: String,
    cpu_percent: f64,
    steal_percent: f64,
    exits: u64,
    guest_bytes: u64,
    resident_bytes: u64,
    shared_bytes: u64,
    overhead_bytes: u64,
    disk_read_bytes: u64,
    disk_written_bytes: u64,
    received_bytes: u64,
    sent_bytes: u64,
}

pub fn stats(args: &StatsArgs) -> ExitCode {
    conclude(Store::of_user().map_err(Failure::from).and_then(|store| {
        let vms = match &args.name {
            Some(name) => {
                let vm = store.find(name)?;
                if !vm.is_locked() {
                    return Err(StoreError::NotRunning(name.clone()).into());
                }
                vec![vm]
            }
            None => store.all()?,
        };
        let before = look(&vms);
        let start = Instant::now();
        // Rates of no time at all are noise.
        std::thread::sleep(args.interval.max(Duration::from_millis(100)));
        let usages = compare(&before, &look(&vms), start.elapsed());
        exit::print(&match args.format {
            Format::Json => format!("{:#}\n", serde_json::json!(usages)),
            Format::Table => table(&usages),
        });
        Ok(())
    }))
}

pub fn top(args: &TopArgs) -> ExitCode {
    conclude(Store::of_user().map_err(Failure::from).and_then(|store| watch(&store, args.interval)))
}

fn watch(store: &Store, interval: Duration) -> Result<(), Failure> {
    let failed = || Failure::host("use the terminal");
    if !io::stdout().is_terminal() {
        let source = io::Error::other("it is none; 'tranche stats' is for scripts");
        return Err(Failure::Host { what: "use the terminal", source });
    }
    let _terminal = RawTerminal::enter().map_err(failed())?;
    let mut before = look(&store.all()?);
    let mut since = Instant::now();
    loop {
        if quits_within(interval).map_err(failed())? {
            exit::print("\r\n");
            return Ok(());
        }
        let now = look(&store.all()?);
        let usages = compare(&before, &now, since.elapsed());
        (before, since) = (now, Instant::now());
        let text = format!("tranche top: {} VMs run; 'q' ends this\n\n{}", usages.len(), table(&usages));
        // From the top left, what was there is overwritten; then the rest of the screen is cleared.
        exit::print(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\r\n")));
    }
}

/// Waits; does the user want to leave meanwhile?
fn quits_within(interval: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + interval;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let stdin = io::stdin();
        if poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&timeout))? == 0 {
            return Ok(false);
        }
        let mut keys = [0; 16];
        let mut input = fs::File::from(stdin.as_fd().try_clone_to_owned()?);
        let count = input.read(&mut keys)?;
        // Ctrl-C and Ctrl-D too, which are keys like others now.
        if count == 0 || keys[..count].iter().any(|key| b"qQ\x03\x04".contains(key)) {
            return Ok(true);
        }
    }
}

/// What those of them that run have taken by now.
fn look(vms: &[Vm]) -> BTreeMap<String, Sample> {
    let running = vms.iter().filter(|vm| vm.is_locked());
    running.filter_map(|vm| Some((vm.name().to_owned(), sample(vm)?))).collect()
}

fn sample(vm: &Vm) -> Option<Sample> {
    let life = vm.life().filter(|life| life.ended.is_none())?;
    let pid = life.vmm.unwrap_or(life.pid);
    let mut sample = Sample { pid, ..Sample::default() };
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        // Time on a CPU, time in its queue, in nanoseconds (the kernel's Documentation/scheduler/sched-stats.rst).
        let times = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let mut times = times.split_whitespace().map(|time| Duration::from_nanos(time.parse().unwrap_or(0)));
        sample.cpu += times.next().unwrap_or_default();
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("vcpu") {
            sample.stolen += times.next().unwrap_or_default();
        }
    }
    sample.guest = vm.running_definition().map_or(0, |definition| definition.vm.memory.0);
    sample.counts = counts(&ask_text(vm, "/v2/metrics").unwrap_or_default());
    let memory = |what| sample.counts.get(&format!("tranche_memory_{what}_bytes")).copied().unwrap_or(0);
    (sample.resident, sample.shared, sample.overhead) = (memory("guest"), memory("shared"), memory("overhead"));
    Some(sample)
}

/// Sums of Prometheus' counters over all devices, by name.
fn counts(text: &str) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some((name, count)) = line.rsplit_once(' ') {
            let name = name.split('{').next().unwrap_or(name);
            let sum: &mut u64 = counts.entry(name.to_owned()).or_default();
            // What a VMM says that may be in other hands.
            *sum = sum.saturating_add(count.parse().unwrap_or(0));
        }
    }
    counts
}

fn compare(before: &BTreeMap<String, Sample>, now: &BTreeMap<String, Sample>, time: Duration) -> Vec<Usage> {
    let seconds = time.as_secs_f64().max(0.001);
    let usage = |(name, now): (&String, &Sample)| {
        // One that was started in between has taken all of it since.
        let before = before.get(name).filter(|before| before.pid == now.pid).cloned().unwrap_or_default();
        let percent = |now: Duration, before| now.saturating_sub(before).as_secs_f64() / seconds * 100.0;
        let rate = |names: &[&str]| {
            let of = |sample: &Sample| {
                let counts = names.iter().filter_map(|name| sample.counts.get(*name).copied());
                counts.fold(0, u64::saturating_add)
            };
            (of(now).saturating_sub(of(&before)) as f64 / seconds) as u64
        };
        Usage {
            name: name.clone(),
            cpu_percent: percent(now.cpu, before.cpu),
            steal_percent: percent(now.stolen, before.stolen),
            exits: rate(&EXITS),
            guest_bytes: now.guest,
            resident_bytes: now.resident,
            shared_bytes: now.shared,
            overhead_bytes: now.overhead,
            disk_read_bytes: rate(&["tranche_block_read_bytes_total"]),
            disk_written_bytes: rate(&["tranche_block_write_bytes_total"]),
            received_bytes: rate(&["tranche_net_rx_bytes_total"]),
            sent_bytes: rate(&["tranche_net_tx_bytes_total"]),
        }
    };
    now.iter().map(usage).collect()
}

/// What vCPUs have left the guest for, as `/v2/metrics` has it.
const EXITS: [&str; 4] = [
    "tranche_vcpu_exit_io_in_total",
    "tranche_vcpu_exit_io_out_total",
    "tranche_vcpu_exit_mmio_read_total",
    "tranche_vcpu_exit_mmio_write_total",
];

fn table(usages: &[Usage]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "CPU%",
        "STEAL%",
        "EXITS/s",
        "GUEST",
        "RESIDENT",
        "SHARED",
        "OVERHEAD",
        "READ/s",
        "WRITTEN/s",
        "RX/s",
        "TX/s",
    ]);
    for usage in usages {
        table.row([
            &usage.name,
            &format!("{:.1}", usage.cpu_percent),
            &format!("{:.1}", usage.steal_percent),
            &usage.exits.to_string(),
            &MemorySize(usage.guest_bytes).to_string(),
            &short(usage.resident_bytes),
            &short(usage.shared_bytes),
            &short(usage.overhead_bytes),
            &short(usage.disk_read_bytes),
            &short(usage.disk_written_bytes),
            &short(usage.received_bytes),
            &short(usage.sent_bytes),
        ]);
    }
    table.to_string()
}

/// With one digit behind the point, in the unit that fits.
fn short(bytes: u64) -> String {
    match bytes {
        0..1024 => bytes.to_string(),
        1024..1_048_576 => format!("{:.1}K", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1}M", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1}G", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_time_between() {
        let sample = |pid, cpu, read| Sample {
            pid,
            cpu: Duration::from_millis(cpu),
            counts: counts(&format!(
                "# TYPE x counter\ntranche_block_read_bytes_total{{id=\"a\"}} {read}\ntranche_block_read_bytes_total{{id=\"b\"}} 5\n"
            )),
            ..Sample::default()
        };
        let of = |sample| BTreeMap::from([("a".to_owned(), sample)]);
        let usage = |before, now| compare(&of(before), &of(now), Duration::from_secs(2)).remove(0);
        let same = usage(sample(1, 500, 100), sample(1, 1500, 300));
        assert_eq!((same.cpu_percent, same.disk_read_bytes), (50.0, 100));
        let other = usage(sample(1, 500, 100), sample(2, 100, 95));
        assert_eq!((other.cpu_percent, other.disk_read_bytes), (5.0, 50), "another process begins anew");
    }

    #[test]
    fn bytes_are_short() {
        assert_eq!([short(5), short(1536), short(3 << 30)], ["5", "1.5K", "3.0G"]);
    }
}
