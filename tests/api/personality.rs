//! What the program is when it is called `firecracker`.

use crate::support::{Running, guests};
use crate::vm::{LIMIT, Vm, firecracker, logging_firecracker};

fn run(args: &[&str]) -> crate::support::Ended {
    Running::start(logging_firecracker().args(args)).wait(LIMIT)
}

#[test]
fn it_tells_its_version_and_refuses_what_it_does_not_know() {
    let version = run(&["--version"]).expect_code(0).output;
    assert!(version.starts_with("Firecracker v1."), "{version}");
    assert!(run(&["--help"]).expect_code(0).output.contains("--api-sock"));
    for args in [&["--nonsense"][..], &["--no-api"], &["--id", "a_b"], &["--level", "Loud"], &["--metadata", "f"]] {
        run(args).expect_code(153);
    }
}

#[test]
fn an_existing_path_is_no_place_for_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    std::fs::write(&path, "precious").unwrap();
    let path = path.to_str().unwrap();
    let ended = run(&["--api-sock", path]).expect_code(1);
    let text = format!("Failed to open the API socket at: {path}. Check that it is not already used.");
    assert!(ended.errors.contains(&text), "{}", ended.errors);
    assert_eq!(std::fs::read(path).unwrap(), b"precious");
}

#[test]
fn a_configuration_file_starts_a_vm() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    let kernel = guests().join("hello");
    let write = |more: &str| {
        let boot = format!(r#""boot-source":{{"kernel_image_path":{kernel:?},"boot_args":"end=off"}}"#);
        std::fs::write(&file, format!(r#"{{{boot},"drives":[]{more}}}"#)).unwrap();
    };
    let path = file.to_str().unwrap();
    std::fs::write(&file, r#"{"drives":[]}"#).unwrap();
    let ended = run(&["--no-api", "--config-file", path]).expect_code(152);
    assert!(ended.errors.contains("missing field `boot-source`"), "{}", ended.errors);
    std::fs::write(&file, format!(r#"{{"boot-source":{{"kernel_image_path":{kernel:?}}}}}"#)).unwrap();
    let ended = run(&["--no-api", "--config-file", path]).expect_code(152);
    assert!(ended.errors.contains("missing field `drives`"), "{}", ended.errors);
    let cpu_config = dir.path().join("cpu.json");
    std::fs::write(&cpu_config, r#"{"kvm_capabilities":["4711"]}"#).unwrap();
    write(&format!(r#","cpu-config":{cpu_config:?}"#));
    let ended = run(&["--no-api", "--config-file", path]).expect_code(152);
    assert!(ended.errors.contains("lacks capability 4711"), "{}", ended.errors);
    write(r#","cpu-config":"/nowhere/cpu.json""#);
    let ended = run(&["--no-api", "--config-file", path]).expect_code(152);
    assert!(ended.errors.contains("/nowhere/cpu.json"), "{}", ended.errors);
    write("");
    let ended = run(&["--no-api", "--level", "Off", "--config-file", path]).expect_code(0);
    assert!(ended.output.contains("hello\n"), "{}", ended.output);
    write(r#","machine-config":{"vcpu_count":0,"mem_size_mib":1}"#);
    run(&["--no-api", "--config-file", path]).expect_code(152);
    write(r#","vsock":{"guest_cid":3,"uds_path":"v"}"#);
    let ended = run(&["--no-api", "--config-file", path]).expect_code(152);
    assert!(ended.errors.contains("vsock device is not supported"), "{}", ended.errors);
    std::fs::write(&file, "{").unwrap();
    run(&["--no-api", "--config-file", path]).expect_code(152);
    run(&["--no-api", "--config-file", "/nowhere"]).expect_code(152);
}

#[test]
fn it_logs_what_tools_look_for() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut command = logging_firecracker();
    command.args(["--id", "my-vm", "--boot-timer", "--show-level", "--log-path"]).arg(&log);
    let vm = Vm::start(command);
    vm.fault("PUT", "/actions", r#"{"action_type":"Fly"}"#);
    vm.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64}"#);
    vm.put_kernel("hello", "mark=1 end=off");
    vm.act("InstanceStart");
    vm.running.wait(LIMIT).expect_code(0);
    let text = std::fs::read_to_string(&log).unwrap();
    for line in [
        "[my-vm:main:INFO] Running Firecracker v1.",
        "Listening on API socket (",
        "[my-vm:fc_api:INFO] The API server received a Put request on \"/actions\" with body \"{\\\"action_type\\\":\\\"Fly\\\"}\".",
        ":ERROR] Received Error. Status code: 400 Bad Request. Message: ",
        "The request was executed successfully. Status code: 204 No Content.",
        "Guest-boot-time = ",
        "Firecracker exiting successfully. exit_code=0",
    ] {
        assert!(text.contains(line), "no '{line}' in:\n{text}");
    }
    let first = text.lines().next().unwrap();
    let time = first.split(' ').next().unwrap();
    assert!(time.len() == 29 && time.as_bytes()[10] == b'T' && time.as_bytes()[19] == b'.', "{first}");
}

#[test]
fn metrics_are_lines_of_what_happened_since_the_last_one() {
    let vm = Vm::start(firecracker());
    let (file, disk) = (vm.path("metrics"), vm.path("disk"));
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let body = format!(r#"{{"metrics_path":{file:?}}}"#);
    vm.put("/metrics", &body);
    vm.expect_fault("PUT", "/metrics", &body, "set up already");
    vm.put("/drives/root", &crate::vm::drive("root", true, &disk));
    vm.put_kernel("hello", "end=halt");
    vm.act("InstanceStart");
    vm.running.output.wait_for("\nend\n", LIMIT);
    vm.act("FlushMetrics");
    vm.act("FlushMetrics");
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[0]["put_api_requests"]["drive_count"], 1);
    assert_eq!(lines[0]["put_api_requests"]["metrics_fails"], 1);
    assert!(lines[1]["vcpu"]["exit_io_out"].as_u64().unwrap() > 100, "{text}");
    assert_eq!(lines[1]["put_api_requests"]["drive_count"], 0);
    assert_eq!(lines[1]["block_root"]["read_count"], 0);
    assert_eq!(lines[2]["put_api_requests"]["actions_count"], 1);
    let prometheus = vm.ask("GET", "/v2/metrics", None);
    let text = String::from_utf8(prometheus.body).unwrap();
    assert!(text.contains("\ntranche_put_api_requests_drive_total 1\n"), "{text}");
    assert!(text.contains("tranche_block_read_bytes_total{id=\"root\"} 0\n"), "{text}");

    // Latencies are those of the last time, also in a line in which there was none.
    assert_eq!(lines[2]["latencies_us"]["pause_vm"], 0);
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    let create = serde_json::json!({ "snapshot_path": vm.path("state"), "mem_file_path": vm.path("memory") });
    vm.put("/snapshot/create", &create.to_string());
    vm.patch("/vm", r#"{"state":"Resumed"}"#);
    vm.act("FlushMetrics");
    vm.act("FlushMetrics");
    let text = std::fs::read_to_string(&file).unwrap();
    let line =
        |number: usize| -> serde_json::Value { serde_json::from_str(text.lines().nth(number).unwrap()).unwrap() };
    for name in ["pause_vm", "resume_vm", "full_create_snapshot", "vmm_full_create_snapshot"] {
        assert!(line(3)["latencies_us"][name].as_u64().unwrap() > 0, "{name}: {text}");
        assert_eq!(line(4)["latencies_us"][name], line(3)["latencies_us"][name]);
    }
    assert_eq!(line(4)["latencies_us"]["diff_create_snapshot"], 0);
    vm.kill().expect_code(0);
}

#[test]
fn threads_have_the_names_that_tools_know() {
    let vm = Vm::start(firecracker());
    vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#);
    vm.boot_hello("end=halt");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.running.child.id())).unwrap();
    let names: Vec<_> = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap().trim().to_owned())
        .collect();
    for name in ["fc_api", "fc_vcpu 0", "fc_vcpu 1"] {
        assert!(names.iter().any(|known| known == name), "{name} of {names:?}");
    }
    vm.kill().expect_code(0);
}

#[test]
fn fatal_signals_have_exit_codes_of_their_own() {
    use rustix::process::Signal;
    for (signal, code) in [
        (Signal::SYS, 148),
        (Signal::BUS, 149),
        (Signal::SEGV, 150),
        (Signal::XFSZ, 151),
        (Signal::XCPU, 154),
        (Signal::HUP, 156),
        (Signal::ILL, 157),
    ] {
        let vm = Vm::start(firecracker());
        // It is past its start when it answers.
        vm.get("/");
        vm.running.signal(signal);
        vm.running.wait(LIMIT).expect_code(code);
    }
}

#[test]
fn the_vm_of_a_configuration_file_runs_before_the_api_answers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    let kernel = guests().join("hello");
    let boot = format!(r#"{{"boot-source":{{"kernel_image_path":{kernel:?},"boot_args":"end=halt"}},"drives":[]}}"#);
    std::fs::write(&file, boot).unwrap();
    let mut command = firecracker();
    command.arg("--config-file").arg(&file).args(["--http-api-max-payload-size", "100", "--no-seccomp"]);
    let vm = Vm::start(command);
    assert_eq!(vm.get("/")["state"], "Running");
    vm.expect_fault("PATCH", "/vm", &format!(r#"{{"state":"Paused"{}}}"#, " ".repeat(100)), "more than 100 bytes");
    vm.act("FlushMetrics");
    vm.kill().expect_code(0);
}

/// A bucket of five bytes, which an hour does not fill again.
#[test]
fn a_serial_port_has_a_limit() {
    let vm = Vm::start(firecracker());
    let out = vm.path("out");
    vm.put("/serial", &format!(r#"{{"serial_out_path":{out:?},"rate_limiter":{{"size":5,"refill_time":360000000}}}}"#));
    vm.put_kernel("hello", "end=off");
    vm.act("InstanceStart");
    vm.running.wait(LIMIT).expect_code(0);
    assert_eq!(std::fs::read_to_string(out).unwrap(), "hello");
}
