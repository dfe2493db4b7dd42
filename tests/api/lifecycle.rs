//! From nothing to a running VM and to its end.

use serde_json::json;
use tranche::api::client::Client;

use crate::vm::{AFTER, BEFORE, LIMIT, Vm, firecracker, vmm};

#[test]
fn a_vm_is_described_started_paused_resumed_and_ended() {
    let vm = Vm::start(firecracker());
    let instance = vm.get("/");
    assert_eq!(instance["state"], "Not started");
    assert_eq!(instance["app_name"], "Firecracker");
    assert_eq!(instance["id"], "anonymous-instance");
    assert_eq!(vm.get("/version")["firecracker_version"], instance["vmm_version"]);

    vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#);
    vm.boot_hello("end=halt x=1");
    assert_eq!(vm.get("/")["state"], "Running");
    // What a client says stands as it is said; the rest is appended.
    assert!(vm.running.output.text().contains("cmdline=end=halt x=1 pci=off\n"), "{}", vm.running.output.text());
    for _ in 0..3 {
        vm.patch("/vm", r#"{"state":"Paused"}"#);
        assert_eq!(vm.get("/")["state"], "Paused");
        vm.patch("/vm", r#"{"state":"Paused"}"#);
        vm.patch("/vm", r#"{"state":"Resumed"}"#);
        assert_eq!(vm.get("/")["state"], "Running");
        vm.patch("/vm", r#"{"state":"Resumed"}"#);
    }
    vm.kill().expect_code(0);
}

/// The order of the keys is a part of the interface.
#[test]
fn what_is_shown_has_its_shape() {
    let vm = Vm::start(firecracker());
    let text = |path| String::from_utf8(vm.ask("GET", path, None).body).unwrap();
    let config = r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#;
    assert_eq!(text("/machine-config"), config);
    vm.put("/machine-config", r#"{"vcpu_count":3,"mem_size_mib":256,"track_dirty_pages":true}"#);
    vm.patch("/machine-config", r#"{"mem_size_mib":512}"#);
    let config = r#"{"vcpu_count":3,"mem_size_mib":512,"smt":false,"track_dirty_pages":true,"huge_pages":"None"}"#;
    assert_eq!(text("/machine-config"), config);
    let disk = vm.path("disk");
    std::fs::write(&disk, [0; 512]).unwrap();
    vm.put("/drives/d", &crate::vm::drive("d", false, &disk));
    let shown = vm.get("/vm/config");
    assert_eq!(shown["machine-config"]["vcpu_count"], 3);
    let drive = json!({
        "drive_id": "d", "partuuid": null, "is_root_device": false, "cache_type": "Unsafe", "is_read_only": false,
        "path_on_host": disk, "rate_limiter": null, "io_engine": "Sync", "socket": null,
    });
    assert_eq!(shown["drives"], json!([drive]));
    assert_eq!(shown["balloon"], json!(null));
}

#[test]
fn what_belongs_before_or_after_the_start_is_refused_at_the_other_time() {
    let vm = Vm::start(firecracker());
    let after = [
        ("PATCH", "/vm", r#"{"state":"Paused"}"#),
        ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#),
        ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#),
        ("PATCH", "/drives/a", r#"{"drive_id":"a"}"#),
        ("PATCH", "/network-interfaces/a", r#"{"iface_id":"a"}"#),
        ("DELETE", "/drives/a", ""),
        ("PUT", "/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"m"}"#),
        ("PATCH", "/balloon", r#"{"amount_mib":1}"#),
    ];
    for (method, path, body) in after {
        assert_eq!(vm.fault(method, path, body), BEFORE, "{method} {path}");
    }
    vm.expect_fault("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, "without a kernel");
    vm.boot_hello("end=halt");
    let before = [
        ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
        ("PUT", "/boot-source", r#"{"kernel_image_path":"k"}"#),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64}"#),
        ("PATCH", "/machine-config", r#"{"vcpu_count":1}"#),
        ("PUT", "/cpu-config", "{}"),
        ("PUT", "/entropy", "{}"),
        ("PUT", "/serial", "{}"),
        ("PUT", "/logger", "{}"),
        ("PUT", "/metrics", r#"{"metrics_path":"m"}"#),
        ("PUT", "/hotplug/memory", r#"{"total_size_mib":1024}"#),
        ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#),
        ("PUT", "/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#),
        ("PUT", "/mmds/config", r#"{"network_interfaces":[]}"#),
        ("PUT", "/snapshot/load", r#"{"snapshot_path":"s","mem_file_path":"m"}"#),
    ];
    for (method, path, body) in before {
        assert_eq!(vm.fault(method, path, body), AFTER, "{method} {path}");
    }
    vm.kill().expect_code(0);
}

#[test]
fn what_is_not_there_yet_says_so() {
    let vm = Vm::start(firecracker());
    for (path, body) in [
        ("/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#),
        ("/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#),
        ("/mmds", "{}"),
        ("/pmem/p", r#"{"id":"p","path_on_host":"p"}"#),
        ("/hotplug/memory", r#"{"total_size_mib":1024}"#),
    ] {
        vm.expect_fault("PUT", path, body, "not supported by this version");
    }
    vm.expect_fault(
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":64,"cpu_template":"T2"}"#,
        "only None is",
    );
}

#[test]
fn events_tell_of_every_change() {
    let vm = Vm::start(vmm());
    let mut events = Client::connect(&vm.socket).unwrap().stream("GET", "/v2/events", None).unwrap();
    assert_eq!((events.status, events.content_type.as_deref()), (200, Some("application/x-ndjson")));
    let mut next = || {
        let line = events.next_line().unwrap().expect("a line");
        let event: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(event["event"], "state");
        let time = event["time"].as_str().unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z') && time.len() == 24, "{time}");
        (event["from"].as_str().map(str::to_owned), event["to"].as_str().unwrap().to_owned())
    };
    let change = |from: &str, to: &str| (Some(from.to_owned()), to.to_owned());
    assert_eq!(next(), (None, "not started".into()));
    vm.boot_hello("end=button");
    assert_eq!(next(), change("not started", "starting"));
    assert_eq!(next(), change("starting", "running"));
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    assert_eq!(next(), change("running", "paused"));
    vm.patch("/vm", r#"{"state":"Resumed"}"#);
    assert_eq!(next(), change("paused", "running"));
    vm.put("/v2/vm/power", r#"{"power":"off"}"#);
    assert_eq!(next(), change("running", "stopping"));
    assert_eq!(next(), change("stopping", "ended"));
    assert!(events.next_line().unwrap().is_none(), "the stream ends with the VM");
    vm.running.wait(LIMIT).expect_code(0);
}

#[test]
fn our_own_api_has_honest_statuses() {
    let vm = Vm::start(vmm());
    let shown = vm.get("/v2/vm");
    assert_eq!((&shown["state"], &shown["vcpus"]), (&json!("not started"), &json!(1)));
    for (method, path, body, status) in [
        ("GET", "/v2/nothing", None, 404),
        ("PUT", "/v2/vm", Some("{}"), 405),
        ("GET", "/v2/vm/power", None, 405),
        ("GET", "/v2/vm", Some("{}"), 400),
        ("PUT", "/v2/vm/power", Some("{"), 400),
        ("PUT", "/v2/vm/power", Some(r#"{"power":"fly"}"#), 400),
        ("PUT", "/v2/vm/power", Some(r#"{"power":"off"}"#), 409),
        ("PUT", "/v2/vm/power", Some(r#"{"power":"on"}"#), 409),
    ] {
        let answer = vm.ask(method, path, body);
        let problem: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!((answer.status, &problem["status"]), (status, &json!(status)), "{method} {path}: {problem}");
        assert_eq!(answer.content_type.as_deref(), Some("application/problem+json"));
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.ends_with('.')), "{problem}");
    }
    vm.put_kernel("hello", "end=halt");
    vm.put("/v2/vm/power", r#"{"power":"on"}"#);
    vm.running.output.wait_for("\nend\n", LIMIT);
    assert_eq!(vm.get("/v2/vm")["state"], "running");
    vm.kill().expect_code(5);
}

/// The document is there before and after the start, and names what is served.
#[test]
fn the_api_describes_itself() {
    let vm = Vm::start(vmm());
    let document = vm.get("/v2/openapi.json");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{id}", "x");
            if path == "/v2/events" {
                continue;
            }
            let body = (method == "put" || method == "patch").then_some("[]");
            let answer = vm.ask(&method.to_uppercase(), &path, body);
            let text = String::from_utf8_lossy(&answer.body);
            assert!(!text.contains("method and/or path") && ![404, 405].contains(&answer.status), "{method} {path}");
        }
    }
}
