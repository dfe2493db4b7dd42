//! Clients that misbehave disturb nobody.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::vm::{Vm, firecracker};

#[test]
fn odd_clients_disturb_nobody() {
    let vm = Vm::start(firecracker());
    vm.boot_hello("end=halt");
    let connect = || UnixStream::connect(&vm.socket).unwrap();
    let mut half = connect();
    half.write_all(b"PUT /actions HTTP/1.1\r\nContent-Le").unwrap();
    let mut garbage = connect();
    garbage.write_all(&[0xff; 3000]).unwrap();
    let mut huge = connect();
    huge.write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n").unwrap();
    let mut waiting = connect();
    waiting.write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 10\r\n\r\n{").unwrap();
    assert_eq!(vm.get("/")["state"], "Running");
    for mut refused in [garbage, huge] {
        let mut answer = String::new();
        let _ = refused.read_to_string(&mut answer);
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    vm.patch("/vm", r#"{"state":"Resumed"}"#);
    drop((half, waiting));
    vm.kill().expect_code(0);
}
