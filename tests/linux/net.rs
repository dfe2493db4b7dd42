//! A network card on a tap: ping, and 64 MiB over TCP each way.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use crate::guest::{Guest, LIMIT, value};

const BYTES: usize = 64 << 20;

/// A tap with this side's address; gone with the test.
struct Tap(&'static str);

impl Tap {
    fn new(name: &'static str, address: &str) -> Self {
        ip(&["tuntap", "add", name, "mode", "tap"]);
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

/// Bytes that no checksum takes for others: a xorshift sequence.
fn pattern() -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(BYTES);
    while bytes.len() < BYTES {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes
}

fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()[..32].to_owned()
}

#[test]
fn ping_and_a_transfer_in_both_directions() {
    let _tap = Tap::new("tranche-t0", "172.30.7.1/24");
    let pattern = pattern();
    let sum = md5(&pattern);
    let to_guest = TcpListener::bind("172.30.7.1:0").unwrap();
    let from_guest = TcpListener::bind("172.30.7.1:0").unwrap();
    let (out, back) = (to_guest.local_addr().unwrap().port(), from_guest.local_addr().unwrap().port());
    let mut guest = Guest::new("cloud")
        .arg("--net", "tap=tranche-t0,mac=02:00:00:00:07:02,mtu=1400")
        .arg("--cpus", "2")
        .cmdline("tranche.ip=172.30.7.2/24,172.30.7.1");
    let source = guest.dir.path().join("source.img");
    std::fs::write(&source, &pattern).unwrap();
    guest.command.arg("--disk").arg(format!("{},ro,id=source", source.display()));
    let sender = std::thread::spawn(move || to_guest.accept()?.0.write_all(&pattern));
    let receiver = std::thread::spawn(move || {
        let mut bytes = Vec::with_capacity(BYTES);
        from_guest.accept()?.0.read_to_end(&mut bytes).map(|_| bytes)
    });
    let running = guest.start(&format!(
        "
echo mac=$(cat /sys/class/net/eth0/address)
echo mtu=$(cat /sys/class/net/eth0/mtu)
echo features=$(cat /sys/class/net/eth0/device/features)
ping -c 3 -W 5 172.30.7.1 > /tmp/ping; echo ping=$?
nc 172.30.7.1 {out} < /dev/null | md5sum | sed 's/ .*//; s/^/got=/'
nc 172.30.7.1 {back} < $(disk source); echo sent=$?
"
    ));
    let ended = running.wait(2 * LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "mac"), "02:00:00:00:07:02");
    assert_eq!(value(&ended.output, "mtu"), "1400");
    assert_eq!(value(&ended.output, "ping"), "0");
    // Checksum and segmentation offloads, both ways, and mergeable receive buffers (virtio 1.2, 5.1.3).
    let features = value(&ended.output, "features");
    for bit in [0, 1, 3, 5, 7, 8, 11, 12, 15] {
        assert_eq!(&features[bit..=bit], "1", "feature {bit} in {features}");
    }
    sender.join().unwrap().unwrap();
    assert_eq!(value(&ended.output, "got"), sum, "from the host to the guest");
    assert_eq!(md5(&receiver.join().unwrap().unwrap()), sum, "from the guest to the host");
}
