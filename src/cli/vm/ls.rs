//! `tranche ls`: the named VMs there are.

use std::fs;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::failure::{Failure, conclude};
use crate::cli::exit;
use crate::cli::table::{Format, Table};
use crate::config::{MemorySize, NetBackend, VmConfig};
use crate::store::{Store, StoreError, Vm, now};

/// List named VMs
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct LsArgs {
    /// How to print them
    #[arg(long, default_value = "table")]
    format: Format,

    /// Print names only
    #[arg(short, long)]
    quiet: bool,
}

/// What is listed of a VM. What it is of one that runs is what it was started with.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    state: &'static str,
    /// Why it ended, if that was not wanted.
    why: Option<String>,
    cpus: u8,
    memory_bytes: u64,
    disks: Vec<String>,
    addresses: Vec<String>,
    uptime_seconds: Option<u64>,
    /// Will the next start be of something else?
    pending: bool,
}

pub fn run(args: &LsArgs) -> ExitCode {
    conclude(Store::of_user().map_err(Failure::from).and_then(|store| ls(&store, args)))
}

fn ls(store: &Store, args: &LsArgs) -> Result<(), Failure> {
    let vms = store.all()?;
    if args.quiet {
        exit::print(&vms.iter().map(|vm| format!("{}\n", vm.name())).collect::<String>());
        return Ok(());
    }
    let neighbours = fs::read_to_string("/proc/net/arp").unwrap_or_default();
    let mut damaged = None;
    let mut rows = Vec::with_capacity(vms.len());
    for vm in &vms {
        match Row::of(vm, &neighbours) {
            Ok(row) => rows.push(row),
            // It was removed just now.
            Err(StoreError::Unknown(_)) => {}
            Err(error) => {
                damaged = Some(exit::report_store(&error));
            }
        }
    }
    match args.format {
        Format::Json => exit::print(&format!("{:#}\n", serde_json::json!(rows))),
        Format::Table => exit::print(&table(&rows)),
    }
    damaged.map_or(Ok(()), |exit| Err(Failure::Said(exit as u8)))
}

impl Row {
    /// `neighbours`: as `/proc/net/arp` has them.
    fn of(vm: &Vm, neighbours: &str) -> Result<Self, StoreError> {
        let definition = vm.definition()?;
        let state = vm.state();
        let running = vm.running_definition().filter(|_| state.name() == "running");
        let pending = running.as_ref().is_some_and(|running| definition.differs_from(running));
        let is_running = running.is_some();
        let config = running.unwrap_or(definition).vm;
        Ok(Self {
            name: vm.name().to_owned(),
            state: state.name(),
            why: state.why().map(str::to_owned),
            cpus: config.cpus,
            memory_bytes: config.memory.0,
            disks: config.disks.iter().map(|disk| disk.path.display().to_string()).collect(),
            addresses: if is_running { addresses(&config, neighbours) } else { Vec::new() },
            uptime_seconds: vm.life().filter(|_| is_running).map(|life| now().saturating_sub(life.started) / 1000),
            pending,
        })
    }
}

/// Where the guest is reached: as the host's neighbour, or through forwarded ports.
fn addresses(config: &VmConfig, neighbours: &str) -> Vec<String> {
    let mut addresses = Vec::new();
    for nic in &config.nics {
        match &nic.backend {
            NetBackend::Tap(_) => {
                let mac = nic.mac.map(|mac| mac.to_string()).unwrap_or_default();
                let of_mac = neighbours.lines().skip(1).filter_map(|line| {
                    // Address, type, flags, hardware address, mask, device; flags 0x0 are of one that did not answer.
                    let mut words = line.split_whitespace();
                    let (address, flags, hardware) = (words.next()?, words.nth(1)?, words.next()?);
                    (hardware == mac && flags != "0x0").then(|| address.to_owned())
                });
                addresses.extend(of_mac);
            }
            NetBackend::User(network) => {
                let forwards = network.forwards.iter();
                addresses
                    .extend(forwards.map(|f| format!("127.0.0.1:{}->{}/{}", f.host_port, f.guest_port, f.protocol)));
            }
        }
    }
    addresses
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new(&["NAME", "STATE", "CPUS", "MEMORY", "DISKS", "ADDRESS", "UPTIME"]);
    for row in rows {
        let mut state = row.state.to_owned();
        if row.pending {
            state += " (changes pending)";
        }
        if let Some(why) = &row.why {
            state += &format!(" ({why})");
        }
        let disks: Vec<&str> = row.disks.iter().map(|path| path.rsplit('/').next().unwrap_or(path)).collect();
        let uptime = row.uptime_seconds.map(duration).unwrap_or_default();
        let dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        // Names from files get in here, and must not write elsewhere on the terminal.
        let state = state.replace(char::is_control, "?");
        table.row([
            &row.name,
            &state,
            &row.cpus.to_string(),
            &MemorySize(row.memory_bytes).to_string(),
            &dash(disks.join(",").replace(char::is_control, "?")),
            &dash(row.addresses.join(",")),
            &dash(uptime),
        ]);
    }
    table.to_string()
}

/// As people say it: the two largest units.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{}s", seconds % 60),
        3600..86_400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NetConfig;
    use crate::store::Definition;

    #[test]
    fn durations_as_people_say_them() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (61, "1m1s"), (7260, "2h1m"), (90_000, "1d1h")] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn guests_are_found_among_the_neighbours_and_behind_ports() {
        let neighbours = "IP address       HW type     Flags       HW address            Mask     Device\n\
            10.0.0.2         0x1         0x2         02:00:00:00:00:01     *        tap0\n\
            10.0.0.3         0x1         0x0         02:00:00:00:00:01     *        tap0\n\
            10.0.0.4         0x1         0x2         02:00:00:00:00:02     *        tap0\nnoise\n";
        let mut config = Definition::parse(br#"{"version":1,"vm":{"kernel":"k"}}"#).unwrap().vm;
        let nics = ["tap=tap0,mac=02:00:00:00:00:01", "user,forward=tcp:8080:80"];
        config.nics = nics.iter().map(|nic| nic.parse::<NetConfig>().unwrap()).collect();
        assert_eq!(addresses(&config, neighbours), ["10.0.0.2", "127.0.0.1:8080->80/tcp"]);
    }
}
