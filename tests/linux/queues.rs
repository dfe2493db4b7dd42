//! Network cards of several queues, and vhost-net, which moves the frames in the host's kernel.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;

use crate::guest::{Guest, LIMIT, value};
use crate::net::{Tap, accept, md5, pattern};
use crate::support::Ended;

/// Each way.
const BYTES: usize = 8 << 20;

/// Boots a guest with a card, moves data both ways under its two CPUs, and looks at the process (by its id) while
/// the card is in use.
fn both_ways(name: &'static str, card: &str, transport: &str, look: impl FnOnce(u32)) -> Ended {
    let tap = Tap::made(name, "172.30.8.1/24", &["multi_queue"]);
    let [to_guest, from_guest] = [(); 2].map(|()| TcpListener::bind("172.30.8.1:0").unwrap());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let pattern = pattern(BYTES);
    let mut guest = Guest::new("cloud")
        .arg("--cpus", "2")
        .arg("--transport", transport)
        .arg("--net", format!("tap={name},mac=02:00:00:00:08:02,{card}"))
        .cmdline("tranche.ip=172.30.8.2/24,172.30.8.1");
    let source = guest.dir.path().join("source.img");
    std::fs::write(&source, &pattern).unwrap();
    guest.command.arg("--disk").arg(format!("{},ro,id=source", source.display()));
    let script = format!(
        r#"
echo queues=$(ls /sys/class/net/eth0/queues)
ip link set eth0 address 02:00:00:00:08:99
echo mac=$(cat /sys/class/net/eth0/address)
taskset 1 nc 172.30.8.1 {} < /dev/null | md5sum | sed 's/ .*//; s/^/got=/'
taskset 2 nc 172.30.8.1 {} < $(disk source); echo sent=$?
interrupts() {{ awk "/virtio[0-9]+-$1/ {{ sum += \$2 + \$3 }} END {{ print sum + 0 }}" /proc/interrupts; }}
echo first=$(interrupts input.0)
echo second=$(interrupts input.1)
"#,
        port(&to_guest),
        port(&from_guest)
    );
    let running = guest.start(&script);
    let sum = md5(&pattern);
    let mut stream = accept(&to_guest);
    look(running.vmm());
    stream.write_all(&pattern).unwrap();
    drop(stream);
    let receiver = std::thread::spawn(move || {
        let mut bytes = Vec::with_capacity(BYTES);
        from_guest.accept()?.0.read_to_end(&mut bytes).map(|_| bytes)
    });
    let ended = running.wait(LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "mac"), "02:00:00:00:08:99");
    assert_eq!(value(&ended.output, "got"), sum);
    assert_eq!(value(&ended.output, "sent"), "0");
    assert!(receiver.join().unwrap().unwrap() == pattern, "what has arrived is not what was sent");
    drop(tap);
    ended
}

/// How many of vhost's threads work for a process: in it or (before Linux 6.4) for it, called vhost- and the number
/// of the thread that asked for them.
fn vhost_threads(pid: u32) -> usize {
    let names = |dir: &str| -> Vec<(String, String)> {
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let comm = |path: PathBuf| std::fs::read_to_string(path.join("comm")).unwrap_or_default().trim().to_owned();
        entries.map(|entry| (entry.file_name().into_string().unwrap(), comm(entry.path()))).collect()
    };
    let own = names(&format!("/proc/{pid}/task"));
    let all = names("/proc").into_iter().chain(own.clone());
    all.filter(|(_, comm)| own.iter().any(|(thread, _)| *comm == format!("vhost-{thread}"))).count()
}

fn number(output: &str, key: &str) -> u32 {
    value(output, key).parse().unwrap()
}

#[test]
fn a_card_of_two_pairs_uses_both() {
    let ended = both_ways("tranche-q1", "queues=2", "pci", |pid| assert_eq!(vhost_threads(pid), 0));
    assert_eq!(value(&ended.output, "queues"), "rx-0 rx-1 tx-0 tx-1");
    assert!(number(&ended.output, "first") > 0 && number(&ended.output, "second") > 0, "{}", ended.output);
}

#[test]
fn vhost_moves_the_frames_of_two_pairs() {
    let ended = both_ways("tranche-q2", "queues=2,vhost=on", "pci", |pid| assert_eq!(vhost_threads(pid), 2));
    assert_eq!(value(&ended.output, "queues"), "rx-0 rx-1 tx-0 tx-1");
    assert!(number(&ended.output, "first") > 0 && number(&ended.output, "second") > 0, "{}", ended.output);
}

#[test]
fn vhost_over_mmio() {
    let ended = both_ways("tranche-q3", "vhost=on", "mmio", |pid| assert_eq!(vhost_threads(pid), 1));
    assert_eq!(value(&ended.output, "queues"), "rx-0 tx-0");
}
