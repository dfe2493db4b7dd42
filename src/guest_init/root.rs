//! Finds the root's device among the block devices there are.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::Failure;
use super::cmdline::Root;
use super::partitions;
use super::superblock::{self, PROBED, Superblock};

const BLOCK_DEVICES: &str = "/sys/class/block";
/// How long to wait between two looks.
const TICK: Duration = Duration::from_millis(2);

/// The root's device, below /dev, and what is on it.
pub struct Found {
    pub device: String,
    pub superblock: Option<Superblock>,
}

/// Waits for the device; `None` if it has not come within `patience`.
pub fn wait_for(root: &Root, patience: Option<Duration>) -> Option<Found> {
    let start = Instant::now();
    loop {
        if let Some(name) = names().into_iter().find(|name| is(root, name)) {
            let device = format!("/dev/{name}");
            // The kernel shows a device a moment before it makes the node.
            if Path::new(&device).exists() {
                return Some(Found { superblock: probe(&device), device });
            }
        }
        if patience.is_some_and(|patience| start.elapsed() > patience) {
            return None;
        }
        sleep(TICK);
    }
}

/// Why there is no root, with what there is instead.
pub fn missing(wanted: &str) -> Failure {
    let mut names = names();
    names.sort();
    let there = if names.is_empty() { "there are no block devices".into() } else { names.join(", ") };
    Failure(format!("root={wanted} has not appeared; block devices: {there}"))
}

fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(BLOCK_DEVICES) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn is(root: &Root, name: &str) -> bool {
    let superblock = || probe(&format!("/dev/{name}"));
    match root {
        Root::Device(wanted) => name == wanted,
        Root::Label(wanted) => superblock().is_some_and(|s| s.label.as_ref() == Some(wanted)),
        Root::Uuid(wanted) => superblock().is_some_and(|s| s.uuid.as_ref() == Some(wanted)),
        Root::PartUuid(wanted) => partition(name).is_some_and(|names| names.uuid == *wanted),
        Root::PartLabel(wanted) => partition(name).is_some_and(|names| names.label == *wanted),
    }
}

fn probe(device: &str) -> Option<Superblock> {
    let mut start = Vec::with_capacity(PROBED);
    File::open(device).ok()?.take(PROBED as u64).read_to_end(&mut start).ok()?;
    superblock::probe(&start)
}

/// The names of a partition by its device's name, such as `vda1`.
fn partition(name: &str) -> Option<partitions::Names> {
    let own = Path::new(BLOCK_DEVICES).join(name);
    let number = number_in(&own.join("partition"))?;
    // The class has links to the devices; a partition's lies within its disk's.
    let disk = fs::canonicalize(&own).ok()?.parent()?.to_owned();
    let sector = number_in(&disk.join("queue/logical_block_size"))?;
    let disk = File::open(Path::new("/dev").join(disk.file_name()?)).ok()?;
    partitions::names(&disk, sector.into(), number)
}

fn number_in(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
