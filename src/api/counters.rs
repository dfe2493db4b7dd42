//! How often each path was asked, and refused.

use crate::observe::Counter;

/// A path that is counted: method, its first word (or two), what Firecracker calls it, and whether it counts failures.
pub struct Counted {
    method: &'static str,
    path: &'static str,
    pub group: &'static str,
    pub name: &'static str,
    pub fails: bool,
}

const fn counted(method: &'static str, path: &'static str, name: &'static str) -> Counted {
    let (group, fails) = match method.as_bytes() {
        b"GET" => ("get_api_requests", false),
        b"PUT" => ("put_api_requests", true),
        _ => ("patch_api_requests", true),
    };
    Counted { method, path, group, name, fails }
}

/// In the order in which they are shown.
pub const PATHS: [Counted; 22] = [
    counted("GET", "", "instance_info"),
    counted("GET", "machine-config", "machine_cfg"),
    counted("GET", "mmds", "mmds"),
    counted("GET", "version", "vmm_version"),
    counted("PATCH", "drives", "drive"),
    counted("PATCH", "network-interfaces", "network"),
    counted("PATCH", "machine-config", "machine_cfg"),
    counted("PATCH", "mmds", "mmds"),
    counted("PATCH", "pmem", "pmem"),
    counted("PATCH", "hotplug", "hotplug_memory"),
    counted("PUT", "actions", "actions"),
    counted("PUT", "boot-source", "boot_source"),
    counted("PUT", "drives", "drive"),
    counted("PUT", "logger", "logger"),
    counted("PUT", "machine-config", "machine_cfg"),
    counted("PUT", "cpu-config", "cpu_cfg"),
    counted("PUT", "metrics", "metrics"),
    counted("PUT", "network-interfaces", "network"),
    counted("PUT", "mmds", "mmds"),
    counted("PUT", "vsock", "vsock"),
    counted("PUT", "serial", "serial"),
    counted("PUT", "pmem", "pmem"),
];

/// The counts, by the path's place in [`PATHS`].
#[derive(Debug, Default)]
pub struct ApiCounters {
    pub asked: [Counter; PATHS.len()],
    pub refused: [Counter; PATHS.len()],
    pub deprecated: Counter,
}

impl ApiCounters {
    /// Where requests for `path` are counted, if they are.
    #[must_use]
    pub fn place(method: &str, path: &str) -> Option<usize> {
        let word = path.split('/').nth(1).unwrap_or_default();
        PATHS.iter().position(|counted| counted.method == method && counted.path == word)
    }

    /// All counts, by group and name.
    #[must_use]
    pub fn counts(&self) -> Vec<(&'static str, String, u64)> {
        let mut counts = vec![("deprecated_api", "deprecated_http_api_calls".to_owned(), self.deprecated.get())];
        for (at, path) in PATHS.iter().enumerate() {
            counts.push((path.group, format!("{}_count", path.name), self.asked[at].get()));
            if path.fails {
                counts.push((path.group, format!("{}_fails", path.name), self.refused[at].get()));
            }
        }
        counts
    }

    /// Counts a request that has been answered.
    pub fn count(&self, place: Option<usize>, refused: bool, deprecated: bool) {
        if let Some(place) = place {
            self.asked[place].count();
            if refused {
                self.refused[place].count();
            }
        }
        if deprecated {
            self.deprecated.count();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_where_they_belong() {
        let counters = ApiCounters::default();
        for (path, refused) in [("/drives/a", false), ("/drives/b", true), ("/nothing", true)] {
            counters.count(ApiCounters::place("PUT", path), refused, false);
        }
        let place = ApiCounters::place("PUT", "/drives/x").unwrap();
        assert_eq!((PATHS[place].group, PATHS[place].name), ("put_api_requests", "drive"));
        assert_eq!((counters.asked[place].get(), counters.refused[place].get()), (2, 1));
        assert_eq!(counters.asked.iter().map(Counter::get).sum::<u64>(), 2);
        assert!(ApiCounters::place("GET", "/").is_some());
    }
}
