//! A network card on a tap: ping, and 64 MiB over TCP each way.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::guest::{Guest, LIMIT, value};

const BYTES: usize = 64 << 20;

/// A tap with this side's address; gone with the test.
pub struct Tap(pub &'static str);

impl Tap {
    pub fn new(name: &'static str, address: &str) -> Self {
        Self::made(name, address, &[])
    }

    pub fn made(name: &'static str, address: &str, how: &[&str]) -> Self {
        ip(&[&["tuntap", "add", name, "mode", "tap"], how].concat());
        let tap = Self(name);
        ip(&["addr", "add", address, "dev", name]);
        ip(&["link", "set", name, "up"]);
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", self.0]).status();
    }
}

fn ip(args: &[&str]) {
    assert!(Command::new("ip").args(args).status().unwrap().success(), "ip {args:?}");
}

/// The guest's connection. One that hangs and never connects is a failure, not a wait without end.
pub fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + LIMIT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_write_timeout(Some(LIMIT)).unwrap();
                return stream;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
        assert!(Instant::now() < deadline, "the guest has not connected within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes that no checksum takes for others: a xorshift sequence.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes
}

pub fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()[..32].to_owned()
}

/// A guest at 172.30.7.2 on the tap, whose other side is 172.30.7.1; with more options of its card.
fn guest_on(tap: &Tap, options: &str) -> Guest {
    Guest::new("cloud")
        .arg("--net", format!("tap={},mac=02:00:00:00:07:02,mtu=1400{options}", tap.0))
        .cmdline("tranche.ip=172.30.7.2/24,172.30.7.1")
}

#[test]
fn a_card_has_its_address_and_features_and_answers() {
    let tap = Tap::new("tranche-t0", "172.30.7.1/24");
    let ended = guest_on(&tap, "").run(
        "
echo mac=$(cat /sys/class/net/eth0/address)
echo mtu=$(cat /sys/class/net/eth0/mtu)
echo features=$(cat /sys/class/net/eth0/device/features)
ping -c 3 -W 5 172.30.7.1 > /tmp/ping; echo ping=$?
",
    );
    let ended = ended.expect_code(0);
    assert_eq!(value(&ended.output, "mac"), "02:00:00:00:07:02");
    assert_eq!(value(&ended.output, "mtu"), "1400");
    assert_eq!(value(&ended.output, "ping"), "0");
    // Checksum and segmentation offloads, both ways, and mergeable receive buffers (virtio 1.2, 5.1.3).
    let features = value(&ended.output, "features");
    for bit in [0, 1, 3, 5, 7, 8, 11, 12, 15] {
        assert_eq!(&features[bit..=bit], "1", "feature {bit} in {features}");
    }
}

#[test]
fn a_transfer_to_the_guest_arrives_whole_within_limits() {
    let tap = Tap::new("tranche-t1", "172.30.7.1/24");
    let listener = TcpListener::bind("172.30.7.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let pattern = pattern(BYTES);
    let sum = md5(&pattern);
    let sender = std::thread::spawn(move || listener.accept()?.0.write_all(&pattern));
    let script = format!("nc 172.30.7.1 {port} < /dev/null | md5sum | sed 's/ .*//; s/^/got=/'");
    let ended = guest_on(&tap, ",rx-bandwidth=1M/100,rx-ops=100/10").run(&script).expect_code(0);
    assert_eq!(value(&ended.output, "got"), sum);
    sender.join().unwrap().unwrap();
}

#[test]
fn a_transfer_from_the_guest_arrives_whole_within_limits() {
    let tap = Tap::new("tranche-t2", "172.30.7.1/24");
    let listener = TcpListener::bind("172.30.7.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let pattern = pattern(BYTES);
    let mut guest = guest_on(&tap, ",tx-bandwidth=1M/100,tx-ops=100/10");
    let source = guest.dir.path().join("source.img");
    std::fs::write(&source, &pattern).unwrap();
    guest.command.arg("--disk").arg(format!("{},ro,id=source", source.display()));
    let receiver = std::thread::spawn(move || {
        let mut bytes = Vec::with_capacity(BYTES);
        listener.accept()?.0.read_to_end(&mut bytes).map(|_| bytes)
    });
    let running = guest.start(&format!("nc 172.30.7.1 {port} < $(disk source); echo sent=$?"));
    let ended = running.wait(LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "sent"), "0");
    assert!(receiver.join().unwrap().unwrap() == pattern, "what has arrived is not what was sent");
}
