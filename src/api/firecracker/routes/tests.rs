use proptest::prelude::*;

use super::*;
use crate::config::firecracker::{ActionType, MachineConfig, MachineConfigPatch, WantedState};

fn ask(method: Method, path: &str, body: &str) -> Result<Routed, String> {
    route(&method, path, body.as_bytes()).map_err(|error| error.to_string())
}

fn put(path: &str, body: &str) -> Result<Call, String> {
    ask(Method::Put, path, body).map(|routed| routed.call)
}

fn patch(path: &str, body: &str) -> Result<Call, String> {
    ask(Method::Patch, path, body).map(|routed| routed.call)
}

#[test]
fn every_get_has_its_call() {
    for (path, call) in [
        ("/", Call::GetInstance),
        ("/version", Call::GetVersion),
        ("/vm/config", Call::GetDescription),
        ("/machine-config", Call::GetMachineConfig),
        ("/balloon", Call::Missing("The balloon device", When::Always)),
        ("/mmds", Call::Missing("MMDS", When::Always)),
    ] {
        assert_eq!(ask(Method::Get, path, "").unwrap(), call.into(), "{path}");
        assert_eq!(ask(Method::Get, path, "{}").unwrap_err(), "GET request cannot have a body.");
    }
}

#[test]
fn what_is_no_path_is_told_as_it_was_asked() {
    let nope = |method: &str, path: &str| format!("Invalid request method and/or path: {method} {path}.");
    assert_eq!(ask(Method::Get, "/nope", "").unwrap_err(), nope("GET", "nope"));
    assert_eq!(ask(Method::Get, "/vm", "").unwrap_err(), nope("GET", "vm"));
    assert_eq!(ask(Method::Get, "/version/x", "").unwrap_err(), nope("GET", "version/x"));
    assert_eq!(ask(Method::Put, "/version", "{}").unwrap_err(), nope("PUT", "version"));
    assert_eq!(ask(Method::Put, "/version", "").unwrap_err(), nope("PUT", "version"));
    assert_eq!(ask(Method::Delete, "/drives", "").unwrap_err(), nope("DELETE", "drives"));
    assert_eq!(ask(Method::Delete, "/vm/x", "").unwrap_err(), nope("DELETE", "vm/x"));
    assert_eq!(ask(Method::Other("POST".into()), "/actions", "{}").unwrap_err(), nope("POST", "actions"));
    assert_eq!(ask(Method::Put, "/drives/a/b", "{}").unwrap_err(), nope("PUT", "drives/a/b"));
}

#[test]
fn empty_bodies_are_told_of() {
    for path in ["/actions", "/boot-source", "/machine-config", "/drives/a", "/network-interfaces/a", "/mmds"] {
        assert_eq!(put(path, "").unwrap_err(), "Empty PUT request.", "{path}");
    }
    for path in ["/vm", "/machine-config", "/drives/a", "/network-interfaces/a", "/balloon"] {
        assert_eq!(patch(path, "").unwrap_err(), "Empty PATCH request.", "{path}");
    }
    assert_eq!(patch("/machine-config", "{}").unwrap_err(), "Empty PATCH request.");
    assert_eq!(patch("/balloon/hinting/stop", "").unwrap(), Call::Missing("The balloon device", When::After));
}

#[test]
fn json_that_cannot_be_read_is_told_with_its_place() {
    let start = "An error occurred when deserializing the json body of a request: ";
    for (path, body, what) in [
        ("/actions", "{", "EOF while parsing"),
        ("/actions", r#"{"action_type":"Fly"}"#, "unknown variant `Fly`"),
        ("/actions", r#"{"action_type":"InstanceStart","x":1}"#, "unknown field `x`"),
        ("/boot-source", "{}", "missing field `kernel_image_path`"),
        ("/machine-config", r#"{"vcpu_count":1}"#, "missing field `mem_size_mib`"),
        ("/machine-config", r#"{"vcpu_count":300,"mem_size_mib":1}"#, "invalid value: integer `300`"),
        ("/drives/a", r#"{"drive_id":"a","is_root_device":false,"cache_type":"Fast"}"#, "unknown variant `Fast`"),
        ("/network-interfaces/a", r#"{"iface_id":"a"}"#, "missing field `host_dev_name`"),
        ("/entropy", r#"{"rate_limiter":{"bandwidht":null}}"#, "unknown field `bandwidht`"),
        ("/logger", r#"{"level":"Loud"}"#, "unknown level `Loud`"),
        ("/vsock", r#"{"guest_cid":3}"#, "missing field `uds_path`"),
        ("/snapshot/create", r#"{"snapshot_path":"s"}"#, "missing field `mem_file_path`"),
    ] {
        let text = put(path, body).unwrap_err();
        assert!(
            text.starts_with(start) && text.contains(what) && text.contains(" at line 1 column "),
            "{path}: {text}"
        );
    }
}

#[test]
fn ids_have_to_be_ids_and_the_same() {
    let drive = r#"{"drive_id":"b","is_root_device":false,"path_on_host":"d"}"#;
    assert_eq!(put("/drives/a", drive).unwrap_err(), "The id from the path does not match the id from the body!");
    let nic = r#"{"iface_id":"b","host_dev_name":"t"}"#;
    let other = "The id from the path [a] does not match the id from the body [b]!";
    assert_eq!(put("/network-interfaces/a", nic).unwrap_err(), other);
    assert_eq!(patch("/network-interfaces/a", r#"{"iface_id":"b"}"#).unwrap_err(), other);
    assert!(put("/drives/a-b", drive).unwrap_err().contains("alphanumeric characters and underscores"));
    assert!(put("/drives/", drive).unwrap_err().contains("cannot be empty"));
    assert!(put("/drives", drive).unwrap_err().contains("cannot be empty"));
    assert!(ask(Method::Delete, "/drives/a.b", "").unwrap_err().contains("alphanumeric"));
    assert_eq!(ask(Method::Delete, "/drives/a_1", "").unwrap().call, Call::DeleteDrive("a_1".into()));
}

#[test]
fn values_that_make_no_sense_are_refused() {
    for (path, body, what) in [
        ("/machine-config", r#"{"vcpu_count":0,"mem_size_mib":1}"#, "between 1 and 32"),
        ("/machine-config", r#"{"vcpu_count":33,"mem_size_mib":1}"#, "between 1 and 32"),
        ("/machine-config", r#"{"vcpu_count":3,"mem_size_mib":1,"smt":true}"#, "1 or even with SMT"),
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":0}"#, "has to be more than 0"),
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":18446744073709551615}"#, "has to be more than 0"),
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":3,"huge_pages":"2M"}"#, "even with huge pages"),
        ("/drives/a", r#"{"drive_id":"a","is_root_device":false}"#, "needs path_on_host"),
        ("/drives/a", r#"{"drive_id":"a","is_root_device":false,"socket":"s"}"#, "vhost-user"),
        (
            "/drives/a",
            r#"{"drive_id":"a","is_root_device":false,"path_on_host":"d","partuuid":"1-2"}"#,
            "only makes sense for the root device",
        ),
        (
            "/drives/a",
            r#"{"drive_id":"a","is_root_device":true,"path_on_host":"d","partuuid":"1 init=/bin/sh"}"#,
            "is not a PARTUUID",
        ),
        ("/network-interfaces/a", r#"{"iface_id":"a","host_dev_name":"t","guest_mac":"x"}"#, "is not a MAC address"),
        (
            "/network-interfaces/a",
            r#"{"iface_id":"a","host_dev_name":"t","guest_mac":"01:00:00:00:00:01"}"#,
            "multicast",
        ),
        ("/network-interfaces/a", r#"{"iface_id":"a","host_dev_name":"t","mtu":67}"#, "68 to 65535"),
        ("/network-interfaces/a", r#"{"iface_id":"a","host_dev_name":"t","mtu":65536}"#, "68 to 65535"),
        ("/vsock", r#"{"guest_cid":2,"uds_path":"v"}"#, "0 to 2 are taken"),
        ("/snapshot/load", r#"{"snapshot_path":"s"}"#, "has to be given"),
        (
            "/snapshot/load",
            r#"{"snapshot_path":"s","mem_file_path":"m","mem_backend":{"backend_type":"File","backend_path":"m"}}"#,
            "exclude each other",
        ),
        ("/hotplug/memory", r#"{"total_size_mib":1024,"slot_size_mib":64}"#, "at least 128"),
        ("/hotplug/memory", r#"{"total_size_mib":1000}"#, "multiple of slot_size_mib"),
        ("/cpu-config", r#"{"kvm_capabilities":["x"]}"#, "is not the number of a KVM capability"),
        ("/cpu-config", r#"{"msr_modifiers":[{"addr":"0x10","bitmap":"0b2"}]}"#, "is not a bitmap"),
    ] {
        let text = put(path, body).unwrap_err();
        assert!(text.contains(what), "{path} {body}: {text}");
    }
}

#[test]
fn what_is_going_to_be_given_up_is_marked() {
    let marked = |method, path, body| ask(method, path, body).unwrap().deprecated;
    assert!(marked(Method::Put, "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":9,"cpu_template":"None"}"#));
    assert!(!marked(Method::Put, "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":9}"#));
    assert!(marked(Method::Patch, "/machine-config", r#"{"cpu_template":"None"}"#));
    assert!(marked(Method::Put, "/vsock", r#"{"guest_cid":3,"uds_path":"v","vsock_id":"v"}"#));
    assert!(marked(Method::Put, "/snapshot/load", r#"{"snapshot_path":"s","mem_file_path":"m"}"#));
    assert!(marked(Method::Put, "/mmds/config", r#"{"network_interfaces":[]}"#));
    assert!(!marked(Method::Put, "/mmds/config", r#"{"network_interfaces":[],"version":"V2"}"#));
}

#[test]
fn bodies_become_calls() {
    assert_eq!(put("/actions", r#"{"action_type":"InstanceStart"}"#), Ok(Call::Act(ActionType::InstanceStart)));
    assert_eq!(patch("/vm", r#"{"state":"Resumed"}"#), Ok(Call::SetState(WantedState::Resumed)));
    let config = MachineConfig { vcpu_count: 2, mem_size_mib: 256, ..Default::default() };
    assert_eq!(put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":256}"#), Ok(Call::PutMachineConfig(config)));
    let change = MachineConfigPatch { mem_size_mib: Some(512), ..Default::default() };
    assert_eq!(patch("/machine-config", r#"{"mem_size_mib":512}"#), Ok(Call::PatchMachineConfig(change)));
    let Ok(Call::PutDrive(drive)) =
        put("/drives/root", r#"{"drive_id":"root","is_root_device":true,"path_on_host":"/r","partuuid":"0-1"}"#)
    else {
        panic!("no drive");
    };
    assert_eq!(drive.root_argument(), "root=PARTUUID=0-1 rw");
    // A token bucket may have more than we know.
    put("/entropy", r#"{"rate_limiter":{"ops":{"size":1,"refill_time":2,"more":3}}}"#).unwrap();
}

/// Also when it is refused.
#[test]
fn what_is_going_to_be_given_up_is_marked_in_its_refusal() {
    let marked = |path: &str, body: &str| route(&Method::Put, path, body.as_bytes()).unwrap_err().is_deprecated();
    assert!(marked("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":9,"cpu_template":"T2"}"#));
    assert!(!marked("/machine-config", r#"{"vcpu_count":0,"mem_size_mib":9}"#));
    assert!(marked("/vsock", r#"{"guest_cid":1,"uds_path":"v","vsock_id":"v"}"#));
    assert!(!marked("/vsock", r#"{"guest_cid":1,"uds_path":"v"}"#));
}

#[test]
fn bodies_refuse_fields_that_they_do_not_know() {
    for (path, body) in [
        ("/actions", r#"{"action_type":"InstanceStart"}"#),
        ("/boot-source", r#"{"kernel_image_path":"k"}"#),
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":1}"#),
        ("/cpu-config", r#"{"msr_modifiers":[]}"#),
        ("/drives/a", r#"{"drive_id":"a","is_root_device":false,"path_on_host":"d"}"#),
        ("/network-interfaces/a", r#"{"iface_id":"a","host_dev_name":"t"}"#),
        ("/entropy", r#"{"rate_limiter":null}"#),
        ("/serial", r#"{"serial_out_path":"o"}"#),
        ("/logger", r#"{"level":"wArNiNg"}"#),
        ("/pmem/a", r#"{"id":"a","path_on_host":"p"}"#),
        ("/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#),
        ("/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#),
        ("/hotplug/memory", r#"{"total_size_mib":1024}"#),
        ("/mmds/config", r#"{"network_interfaces":[]}"#),
    ] {
        put(path, body).unwrap_or_else(|text| panic!("{path}: {text}"));
        let more = format!(r#"{},"more":1}}"#, body.trim_end_matches('}'));
        let text = put(path, &more).unwrap_err();
        assert!(text.contains("unknown field `more`"), "{path}: {text}");
    }
    for (path, body) in [
        ("/vm", r#"{"state":"Paused"}"#),
        ("/machine-config", r#"{"smt":true}"#),
        ("/drives/a", r#"{"drive_id":"a"}"#),
        ("/network-interfaces/a", r#"{"iface_id":"a"}"#),
        ("/balloon", r#"{"amount_mib":1}"#),
        ("/balloon/statistics", r#"{"stats_polling_interval_s":1}"#),
        ("/hotplug/memory", r#"{"requested_size_mib":1}"#),
    ] {
        patch(path, body).unwrap_or_else(|text| panic!("{path}: {text}"));
        let more = format!(r#"{},"more":1}}"#, body.trim_end_matches('}'));
        let text = patch(path, &more).unwrap_err();
        assert!(text.contains("unknown field `more`"), "{path}: {text}");
    }
    // But for these.
    put("/metrics", r#"{"metrics_path":"m","more":1}"#).unwrap();
    put("/serial", r#"{"rate_limiter":{"size":1,"refill_time":2,"more":3}}"#).unwrap();
}

proptest! {
    /// Whatever comes, there is an answer.
    #[test]
    fn no_request_is_too_odd(path in "/[a-z/_-]{0,20}", body in "\\PC{0,60}", which in 0usize..4) {
        let method = [Method::Get, Method::Put, Method::Patch, Method::Delete][which].clone();
        let _ = ask(method, &path, &body);
    }

    /// Neither does a body of the right shape with any values.
    #[test]
    fn no_value_is_too_odd(count: u64, size: u64, text in "\\PC{0,20}", smt: bool) {
        let text = serde_json::to_string(&text).unwrap();
        for (path, body) in [
            ("/machine-config", format!(r#"{{"vcpu_count":{},"mem_size_mib":{size},"smt":{smt}}}"#, count % 256)),
            ("/drives/a", format!(r#"{{"drive_id":"a","is_root_device":{smt},"path_on_host":{text},"partuuid":{text}}}"#)),
            ("/network-interfaces/a", format!(r#"{{"iface_id":"a","host_dev_name":{text},"guest_mac":{text}}}"#)),
            ("/hotplug/memory", format!(r#"{{"total_size_mib":{size},"slot_size_mib":{count}}}"#)),
            ("/entropy", format!(r#"{{"rate_limiter":{{"ops":{{"size":{size},"refill_time":{count}}}}}}}"#)),
        ] {
            if let Ok(Call::PutMachineConfig(config)) = put(path, &body) {
                prop_assert!(config.mem_size_mib.checked_mul(1 << 20).is_some());
            }
        }
    }
}
