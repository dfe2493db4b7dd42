//! What goes in and out of the serial port.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use tempfile::tempdir;

use crate::guest::{LIMIT, guest, output_of, started};
use crate::support::{Running, Transcript};

/// All bytes but the one that ends the echo, in an order that shows a byte lost or swapped.
fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i * 7 + i / 256) as u8).map(|byte| if byte == b'q' { b'Q' } else { byte }).collect()
}

#[test]
fn input_of_any_length_comes_back_byte_for_byte() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let mut input = bytes(5_000);
    input.push(b'q');
    std::fs::write(&from, &input).unwrap();
    let mut command = guest("hello", "end=echo");
    command.stdin(std::fs::File::open(&from).unwrap()).stdout(std::fs::File::create(&to).unwrap());
    Running::spawn(&mut command).wait(LIMIT).expect_code(0);
    let output = std::fs::read(&to).unwrap();
    assert!(output.ends_with(&[b"\nend\n", input.as_slice()].concat()), "{}", String::from_utf8_lossy(&output));
}

#[test]
fn keys_mean_nothing_where_there_is_no_terminal() {
    let mut running = started(&mut guest("hello", "end=echo"), "\nend\n");
    running.send("\x01h\x01x\x03q");
    assert!(running.wait(LIMIT).expect_code(0).output.ends_with("\nend\n\x01h\x01x\x03q"));
}

#[test]
fn output_goes_to_a_file_or_nowhere() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("console");
    std::fs::write(&path, vec![b'x'; 100_000]).unwrap();
    let to_stdout = output_of(&mut guest("hello", "x"));
    let serial = format!("file={}", path.display());
    assert_eq!(output_of(guest("hello", "x").args(["--serial", &serial])), "");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), to_stdout, "a file that was there is emptied");
    assert_eq!(output_of(guest("hello", "x").args(["--serial", "null"])), "");
}

/// Connects when there is somebody.
fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + LIMIT;
    loop {
        match UnixStream::connect(path) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_socket_serves_one_client_after_another() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let running = Running::start(guest("hello", "end=echo").args(["--serial", &format!("socket={}", path.display())]));
    let talk = |text: &str| {
        let mut client = connect(&path);
        let said = Transcript::of(client.try_clone().unwrap());
        client.write_all(text.as_bytes()).unwrap();
        said.wait_for(text, LIMIT);
        client
    };
    let _first = talk("one");
    drop(talk("two"));
    let _third = talk("three q");
    let ended = running.wait(LIMIT).expect_code(0);
    assert_eq!(ended.output, "");
    assert!(!path.exists(), "the socket is gone with the VM");
}

/// A socket has room for some hundred bytes that come one by one.
#[test]
fn a_client_of_the_socket_may_take_its_time() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let running = Running::start(guest("hello", "end=echo").args(["--serial", &format!("socket={}", path.display())]));
    let mut client = connect(&path);
    let input = bytes(20_000);
    client.write_all(&input).unwrap();
    let (mut waits, mut before) = (0, u64::MAX);
    while waits != before || waits == 0 {
        before = waits;
        std::thread::sleep(std::time::Duration::from_millis(100));
        waits = rustix::io::ioctl_fionread(&client).unwrap();
    }
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut said = Vec::new();
    while !said.ends_with(&input) {
        let mut some = [0; 4096];
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&client, &mut some)).unwrap();
        assert!(count > 0, "it ends after {} bytes", said.len());
        said.extend_from_slice(&some[..count]);
        assert!(said.len() < input.len() + 1000, "something is lost");
    }
    client.write_all(b"the last words q").unwrap();
    let mut last = String::new();
    client.read_to_string(&mut last).unwrap();
    assert_eq!(last, "the last words q");
    running.wait(LIMIT).expect_code(0);
}

#[test]
fn a_socket_without_a_client_holds_nobody_up() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("console.sock");
    output_of(guest("hello", "x").args(["--serial", &format!("socket={}", path.display())]));
    assert!(!path.exists());
}
