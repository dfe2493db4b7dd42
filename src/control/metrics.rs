//! Metrics: a sample of all that is counted, as Firecracker writes it to a file and as Prometheus reads it.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::latencies::{GROUP, Latencies};
use crate::machine::{DeviceId, Meters};
use crate::memory::MemoryUsage;
use crate::observe::{Exits, Traffic};

/// What the API has counted, by Firecracker's group and name.
pub type ApiCounts = Arc<dyn Fn() -> Vec<(&'static str, String, u64)> + Send + Sync>;

/// A count by its group and name.
pub type Sample = Vec<(String, String, u64)>;

/// Groups and names that are always there, in this order, counted or not. `N.agg` stands for three of a latency.
const ALWAYS: &[(&str, &str)] = &[
    ("api_server", "process_startup_time_us process_startup_time_cpu_us"),
    (
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails \
         free_page_report_count free_page_report_freed free_page_report_fails free_page_hint_count \
         free_page_hint_freed free_page_hint_fails",
    ),
    ("block", BLOCK),
    ("deprecated_api", "deprecated_http_api_calls"),
    (
        "entropy",
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
         entropy_rate_limiter_throttled rate_limiter_event_count",
    ),
    ("get_api_requests", "instance_info_count machine_cfg_count mmds_count vmm_version_count"),
    ("i8042", "error_count missed_read_count missed_write_count read_count reset_count write_count"),
    (
        "latencies_us",
        "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm vmm_full_create_snapshot \
         vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm",
    ),
    ("logger", "missed_metrics_count metrics_fails missed_log_count"),
    ("memory_hotplug", "activate_fails queue_event_fails queue_event_count plug_count unplug_count"),
    (
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token rx_count tx_bytes \
         tx_count tx_errors tx_frames connections_created connections_destroyed",
    ),
    ("net", NET),
    (
        "patch_api_requests",
        "drive_count drive_fails network_count network_fails machine_cfg_count machine_cfg_fails mmds_count mmds_fails \
         pmem_count pmem_fails hotplug_memory_count hotplug_memory_fails",
    ),
    ("pmem", "activate_fails cfg_fails event_fails queue_event_count rate_limiter_event_count"),
    (
        "put_api_requests",
        "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails logger_count \
         logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count cpu_cfg_fails metrics_count metrics_fails \
         network_count network_fails mmds_count mmds_fails vsock_count vsock_fails serial_count serial_fails pmem_count \
         pmem_fails hotplug_memory_count hotplug_memory_fails",
    ),
    ("seccomp", "num_faults"),
    ("signals", "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill"),
    ("uart", "error_count flush_count missed_read_count missed_write_count read_count write_count"),
    (
        "vcpu",
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures exit_io_in_agg exit_io_out_agg \
         exit_mmio_read_agg exit_mmio_write_agg",
    ),
    ("vmm", "panic_count"),
    (
        "vsock",
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails muxer_event_fails \
         conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count tx_bytes_count rx_packets_count \
         tx_packets_count conns_added conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails \
         rx_read_fails",
    ),
];

const BLOCK: &str = "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count \
    queue_event_count rate_limiter_event_count update_count update_fails read_bytes write_bytes read_count write_count \
    read_agg write_agg rate_limiter_throttled_events io_engine_throttled_events remaining_reqs_count";

const NET: &str = "activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer event_fails \
    rx_queue_event_count rx_event_rate_limiter_count rx_rate_limiter_throttled rx_tap_event_count rx_bytes_count \
    rx_packets_count rx_fails rx_count tap_read_fails tap_write_fails tap_write_agg tx_bytes_count tx_malformed_frames \
    tx_fails tx_count tx_packets_count tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled \
    tx_spoofed_mac_count tx_remaining_reqs_count";

/// A metrics file, and what was written to it last.
pub struct MetricsFile {
    file: File,
    before: Sample,
}

impl MetricsFile {
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file, before: Sample::new() }
    }

    /// Adds a line of what has been counted since the one before.
    ///
    /// # Errors
    /// What the file's host says.
    pub fn write(&mut self, now: Sample) -> io::Result<()> {
        let mut line = json(&now, &self.before, SystemTime::now());
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        self.before = now;
        Ok(())
    }
}

/// All that has been counted by now. Devices are there by themselves (`block_ID`) and together (`block`).
pub fn sample(machine: Option<&Meters>, api: Option<&ApiCounts>, latencies: &Latencies) -> Sample {
    let mut sample: Sample = latencies.all().map(|(name, micros)| (GROUP.to_owned(), name, micros)).collect();
    if let Some(api) = api {
        sample.extend(api().into_iter().map(|(group, name, count)| (group.to_owned(), name, count)));
    }
    let Some(machine) = machine else { return sample };
    for exits in machine.exits() {
        add_exits(&mut sample, exits);
    }
    for (id, traffic) in machine.traffic() {
        match (id, &*traffic) {
            (DeviceId::Disk(id), [disk]) => {
                for group in ["block".to_owned(), format!("block_{id}")] {
                    add_disk(&mut sample, &group, disk);
                }
            }
            (DeviceId::Nic(id), [rx, tx]) => {
                for group in ["net".to_owned(), format!("net_{id}")] {
                    add_nic(&mut sample, &group, rx, tx);
                }
            }
            _ => {}
        }
    }
    if let Some(entropy) = machine.entropy_traffic() {
        add(&mut sample, "entropy", "entropy_event_count", entropy.operations.get());
        add(&mut sample, "entropy", "entropy_bytes", entropy.bytes.get());
        add(&mut sample, "entropy", "host_rng_fails", entropy.failed.get());
        add(&mut sample, "entropy", "entropy_rate_limiter_throttled", entropy.throttled.get());
    }
    sample
}

/// Adds to a count, or begins it.
fn add(sample: &mut Sample, group: &str, name: &str, count: u64) {
    match sample.iter_mut().find(|known| known.0 == group && known.1 == name) {
        Some(known) => known.2 += count,
        None => sample.push((group.to_owned(), name.to_owned(), count)),
    }
}

fn add_exits(sample: &mut Sample, exits: &Exits) {
    let counts = [
        ("exit_io_in", &exits.port_reads),
        ("exit_io_out", &exits.port_writes),
        ("exit_mmio_read", &exits.mmio_reads),
        ("exit_mmio_write", &exits.mmio_writes),
        ("failures", &exits.failures),
    ];
    counts.iter().for_each(|(name, count)| add(sample, "vcpu", name, count.get()));
}

fn add_disk(sample: &mut Sample, group: &str, disk: &Traffic) {
    let (writes, written, flushes) = (disk.writes.get(), disk.written_bytes.get(), disk.flushes.get());
    add(sample, group, "write_count", writes);
    add(sample, group, "write_bytes", written);
    add(sample, group, "flush_count", flushes);
    // The rest: what is neither read, written nor flushed is rare.
    add(sample, group, "read_count", disk.operations.get().saturating_sub(writes + flushes));
    add(sample, group, "read_bytes", disk.bytes.get().saturating_sub(written));
    add(sample, group, "execute_fails", disk.failed.get());
    add(sample, group, "rate_limiter_throttled_events", disk.throttled.get());
}

fn add_nic(sample: &mut Sample, group: &str, rx: &Traffic, tx: &Traffic) {
    let counts = [
        ("rx_packets_count", &rx.operations),
        ("rx_count", &rx.operations),
        ("rx_bytes_count", &rx.bytes),
        ("rx_fails", &rx.failed),
        ("rx_rate_limiter_throttled", &rx.throttled),
        ("tx_packets_count", &tx.operations),
        ("tx_count", &tx.operations),
        ("tx_bytes_count", &tx.bytes),
        ("tx_fails", &tx.failed),
        ("tx_rate_limiter_throttled", &tx.throttled),
    ];
    counts.iter().for_each(|(name, count)| add(sample, group, name, count.get()));
}

/// A line as Firecracker writes it: what has been counted since `before`.
fn json(now: &Sample, before: &Sample, time: SystemTime) -> String {
    let count_in = |sample: &Sample, group: &str, name: &str| {
        sample.iter().find(|known| known.0 == group && known.1 == name).map_or(0, |known| known.2)
    };
    let fields = |group: &str, names: &str| -> Value {
        let value = |name: &str| match name.ends_with("_agg") {
            true => serde_json::json!({ "min_us": 0, "max_us": 0, "sum_us": 0 }),
            false => {
                let (now, before) = (count_in(now, group, name), count_in(before, group, name));
                // A VM that has been reset counts anew. A latency is the last one's, and no count.
                let since = now.checked_sub(before).filter(|_| group != GROUP);
                since.unwrap_or(now).into()
            }
        };
        names.split_whitespace().map(|name| (name.to_owned(), value(name))).collect::<Map<_, _>>().into()
    };
    let ms = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let mut line = format!("{{\"utc_timestamp_ms\":{ms}");
    let mut put = |group: &str, names: &str| {
        let _ = write!(line, ",{}:{}", Value::from(group), fields(group, names));
    };
    for (group, names) in ALWAYS {
        put(group, names);
        // Each device of that kind behind all of them.
        let mut known = "";
        for (own, _, _) in now {
            let is_own = own.strip_prefix(group).is_some_and(|rest| rest.starts_with('_'));
            if is_own && ["block", "net"].contains(group) && own != known {
                put(own, names);
                known = own;
            }
        }
    }
    line.push('}');
    line
}

/// All counts as Prometheus reads them (text format 0.0.4): a device is a label.
pub fn prometheus(sample: &Sample, memory: Option<MemoryUsage>) -> String {
    let mut text = String::new();
    let mut described: Vec<String> = Vec::new();
    let mut rows: Vec<_> = sample
        .iter()
        .map(|(group, name, count)| {
            let device = ["block", "net"].into_iter().find_map(|kind| {
                let id = group.strip_prefix(kind)?.strip_prefix('_')?;
                Some((kind, format!("{{id=\"{}\"}}", id.replace(['\\', '"', '\n'], "_"))))
            });
            let (kind, label) = device.unwrap_or((group, String::new()));
            let (suffix, sort) = if group == GROUP { ("", "gauge") } else { ("_total", "counter") };
            (format!("tranche_{kind}_{}{suffix}", name.trim_end_matches("_count")), label, *count, sort)
        })
        // All devices of a kind together would be counted twice.
        .filter(|(name, label, ..)| {
            !label.is_empty() || !(name.starts_with("tranche_block_") || name.starts_with("tranche_net_"))
        })
        .collect();
    rows.sort();
    for (name, label, count, sort) in rows {
        if !described.contains(&name) {
            let _ = writeln!(text, "# TYPE {name} {sort}");
            described.push(name.clone());
        }
        let _ = writeln!(text, "{name}{label} {count}");
    }
    if let Some(MemoryUsage { guest, shared, overhead }) = memory {
        for (what, bytes) in [("guest", guest), ("shared", shared), ("overhead", overhead)] {
            let _ = writeln!(text, "# TYPE tranche_memory_{what}_bytes gauge\ntranche_memory_{what}_bytes {bytes}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn counts() -> Sample {
        let mut sample = Sample::new();
        let disk = Traffic::default();
        disk.operations.add(5);
        disk.bytes.add(5000);
        disk.writes.add(2);
        disk.written_bytes.add(1000);
        for group in ["block", "block_root"] {
            add_disk(&mut sample, group, &disk);
        }
        sample
    }

    #[test]
    fn lines_are_what_happened_since_the_last_one() {
        let time = UNIX_EPOCH + Duration::from_millis(1234);
        let line = json(&counts(), &Sample::new(), time);
        assert!(line.starts_with(r#"{"utc_timestamp_ms":1234,"api_server":{"#), "{line}");
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["block"]["read_count"], 3);
        assert_eq!(value["block_root"]["read_bytes"], 4000);
        assert_eq!(value["block_root"]["read_agg"]["sum_us"], 0);
        assert_eq!(value["vcpu"]["exit_io_in"], 0);
        let places: Vec<_> = ALWAYS.iter().map(|(group, _)| line.find(&format!("\"{group}\":")).unwrap()).collect();
        assert!(places.is_sorted());
        let value: Value = serde_json::from_str(&json(&counts(), &counts(), time)).unwrap();
        assert_eq!(value["block"]["read_count"], 0);
    }

    #[test]
    fn prometheus_finds_each_device_once() {
        let text = prometheus(&counts(), Some(MemoryUsage { guest: 7, ..MemoryUsage::default() }));
        assert!(text.contains("# TYPE tranche_block_read_bytes_total counter\n"), "{text}");
        assert!(
            text.ends_with("# TYPE tranche_memory_overhead_bytes gauge\ntranche_memory_overhead_bytes 0\n"),
            "{text}"
        );
        assert!(text.contains("\ntranche_memory_guest_bytes 7\n"), "{text}");
        assert!(text.contains("tranche_block_read_bytes_total{id=\"root\"} 4000\n"), "{text}");
        assert_eq!(text.matches("tranche_block_read_bytes_total").count(), 2, "{text}");
    }
}
