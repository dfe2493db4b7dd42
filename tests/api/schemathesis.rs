//! schemathesis makes up requests from our OpenAPI document, good and bad ones, and holds the answers against it.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::support::{Running, not_tested, prepared_client};
use crate::vm::{Vm, vmm};

const CHECKS: [&str; 4] =
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"];

/// For some thousand requests.
const LIMIT: Duration = Duration::from_secs(600);

/// A TCP port of ours that leads to the socket, as schemathesis knows no unix sockets.
fn relay(socket: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), UnixStream::connect(&socket).unwrap());
            let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || {
                let _ = io::copy(&mut from_client, &mut to_server);
                let _ = to_server.shutdown(Shutdown::Write);
            });
            thread::spawn(move || answers(server, client));
        }
    });
    address
}

fn answers(mut from_server: UnixStream, mut to_client: TcpStream) {
    let _ = io::copy(&mut from_server, &mut to_client);
    let _ = to_client.shutdown(Shutdown::Both);
}

/// A VM in a directory of its own: a path that is made up may become a log file there.
fn vm() -> Vm {
    let dir = tempfile::tempdir().unwrap();
    let mut command = vmm();
    command.current_dir(dir.path());
    Vm::start_in(dir, command)
}

/// Lets schemathesis loose on all operations but `spared`; the stream of events, which does not end, is one of those.
fn every_answer_is_documented(vm: &Vm, spared: &[&str]) {
    let Some(schemathesis) = prepared_client("python/bin/st") else {
        return not_tested("the API with schemathesis (tests/clients/prepare)");
    };
    let api = format!("http://{}", relay(vm.socket.clone()));
    let mut command = Command::new(schemathesis);
    command.current_dir(vm.dir.path()).args(["run", &format!("{api}/v2/openapi.json"), "--url", &api]);
    // Always the same requests: a new failure is one of ours.
    command.args(["--seed", "1", "--max-examples", "10", "--generation-database", "none", "--no-color"]);
    command.args(["--phases", "coverage,fuzzing", "--continue-on-failure", "--no-shrink", "--request-timeout", "60"]);
    command.args(["--checks", &CHECKS.join(",")]);
    for path in ["/v2/events"].iter().chain(spared) {
        command.args(["--exclude-path", path]);
    }
    let ended = Running::start(&mut command).wait(LIMIT).expect_code(0);
    let tested = ended.output.lines().find_map(|line| line.trim().strip_prefix("Tested: ")?.parse::<usize>().ok());
    assert!(tested.is_some_and(|tested| tested > 30), "{}", ended.output);
}

#[test]
fn every_answer_before_the_start_is_documented() {
    let vm = vm();
    every_answer_is_documented(&vm, &[]);
    assert_eq!(vm.get("/")["state"], "Not started");
}

#[test]
fn every_answer_of_a_running_vm_is_documented() {
    let vm = vm();
    vm.boot_hello("end=halt");
    // This would end it.
    every_answer_is_documented(&vm, &["/v2/vm/power", "/v2/vm/snapshot"]);
    assert!(["Running", "Paused"].contains(&vm.get("/")["state"].as_str().unwrap()));
    vm.kill().expect_code(5);
}
