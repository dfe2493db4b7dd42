//! A network that needs no rights: an address by DHCP, data both ways, forwards, and a cable that comes out.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{Guest, LIMIT, value};
use crate::net::{md5, pattern};
use crate::support::Running;

/// A guest must not end its own direction before all this has come: the passt of Debian 12 then repeats what it has sent.
const BYTES: usize = 16 << 20;

fn guest(net: &str) -> Guest {
    Guest::new("cloud").arg("--net", net).cmdline("tranche.ip=dhcp")
}

#[test]
fn data_goes_both_ways_and_the_host_is_the_gateway() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let sent = pattern(BYTES);
    let sum = md5(&sent);
    let served = std::thread::spawn(move || -> std::io::Result<Vec<u8>> {
        listener.accept()?.0.write_all(&sent)?;
        let mut back = Vec::new();
        listener.accept()?.0.read_to_end(&mut back)?;
        Ok(back)
    });
    let ended = guest("user,host=on,mac=02:00:00:00:0f:01").run(&format!(
        "
echo address=$(ip -4 -o addr show eth0 | sed 's/.*inet //; s/ .*//')
echo route=$(ip route | sed -n 's/^default via //p')
echo mtu=$(cat /sys/class/net/eth0/mtu)
echo features=$(cat /sys/class/net/eth0/device/features)
nc 10.0.2.2 {port} > /tmp/got; echo got=$(md5sum < /tmp/got)
nc 10.0.2.2 {port} < /tmp/got; echo sent=$?
"
    ));
    let ended = ended.expect_code(0);
    assert_eq!(value(&ended.output, "address"), "10.0.2.15/24");
    assert!(value(&ended.output, "route").starts_with("10.0.2.2 dev eth0"));
    assert_eq!(value(&ended.output, "mtu"), "65520");
    // No checksum and no segmentation is left to the other side, neither way (virtio 1.2, 5.1.3).
    let features = value(&ended.output, "features");
    for bit in [0, 1, 2, 7, 8, 9, 10, 11, 12, 13, 14] {
        assert_eq!(&features[bit..=bit], "0", "feature {bit} in {features}");
    }
    assert!(value(&ended.output, "got").starts_with(&sum));
    assert_eq!(value(&ended.output, "sent"), "0");
    assert_eq!(md5(&served.join().unwrap().unwrap()), sum);
}

#[test]
fn the_hosts_loopback_is_closed_and_forwards_lead_in() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = guest("user,forward=tcp:18080:80,forward=udp:18081:81");
    let running = guest.start(&format!(
        "
nc -w 5 10.0.2.2 {port}; echo reached=$?
# Datagrams that nobody wanted.
unwanted() {{ sed -n 's/^Udp: [0-9]* \\([0-9]*\\) .*/\\1/p' /proc/net/snmp; }}
before=$(unwanted)
nc -l -p 80 < /dev/ttyS0 > /tmp/got &
until netstat -ltn | grep -q ':80 '; do sleep 0.2; done
echo listening
until [ $(unwanted) -gt $before ]; do sleep 0.2; done
echo datagram=came
wait $!
echo got=$(md5sum < /tmp/got)
"
    ));
    running.output.wait_for("listening", LIMIT);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..100 {
        // The guest's refusal of the one before may come back as an error.
        let _ = socket.send_to(b"are you there", "127.0.0.1:18081");
        std::thread::sleep(Duration::from_millis(300));
        if running.output.text().contains("datagram=came") {
            break;
        }
    }
    running.output.wait_for("datagram=came", LIMIT);
    let sent = pattern(BYTES);
    TcpStream::connect("127.0.0.1:18080").unwrap().write_all(&sent).unwrap();
    let ended = running.wait(LIMIT).expect_code(0);
    assert_ne!(value(&ended.output, "reached"), "0");
    assert!(listener.accept().is_err(), "the guest has reached the host's loopback");
    assert!(value(&ended.output, "got").starts_with(&md5(&sent)));
}

/// The only process that has been started for the VM, besides its own.
fn passt_of(running: &Running) -> Pid {
    let pid = running.child.id();
    let children = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flat_map(|task| {
        let text = std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
        text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<i32>>()
    });
    let vmm = running.vmm() as i32;
    let children: Vec<i32> = children.filter(|&child| child != vmm).collect();
    assert_eq!(children.len(), 1, "{children:?}");
    Pid::from_raw(children[0]).unwrap()
}

#[test]
fn without_passt_the_cable_is_out_and_the_vm_goes_on() {
    let mut guest = guest("user");
    let running = guest.start(
        "
echo carrier=$(cat /sys/class/net/eth0/carrier)
until [ \"$(cat /sys/class/net/eth0/carrier)\" = 0 ]; do sleep 0.2; done
echo out
ping -c 1 -W 1 10.0.2.2 > /dev/null; echo ping=$?
",
    );
    running.output.wait_for("carrier=1", LIMIT);
    kill_process(passt_of(&running), Signal::KILL).unwrap();
    let ended = running.wait(LIMIT).expect_code(0);
    assert!(ended.output.contains("\nout\n"));
    assert_ne!(value(&ended.output, "ping"), "0");
    assert!(ended.errors.contains("net0: the user network is gone: it has ended"), "{}", ended.errors);
}
