//! Linux guests that are saved in the midst of their work, and go on as if nothing had been.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tranche::api::client::Client;

use crate::guest::{Guest, LIMIT, value};
use crate::net::{Tap, accept, md5, pattern};
use crate::support::{Running, disk_with, tranche};

/// Has every CPU sum up memory, writes numbered records to the disk `data`, each with a flush, and exchanges bytes with a
/// peer, until the peer has no more. Then it tells what has become of all that.
const WORK: &str = "
for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = data ] && disk=/dev/${d##*/}; done
dd if=/dev/urandom of=/tmp/memory bs=64k count=64 2> /dev/null
sum=$(md5sum < /tmp/memory)
seq 1 3000 > /tmp/chunk
for cpu in $(seq $(nproc)); do
    (while [ ! -e /tmp/done ]; do [ \"$(md5sum < /tmp/memory)\" = \"$sum\" ] || echo bad >> /tmp/memory.bad; done) &
done
(
    n=0 before=0
    while [ ! -e /tmp/done ]; do
        n=$((n + 1))
        echo \"record $n\" | dd of=$disk bs=512 seek=$n conv=fsync,notrunc 2> /dev/null || echo $n >> /tmp/disk.bad
        echo $n > /tmp/last
        read now rest < /proc/uptime
        [ ${now%.*} -ge $before ] || echo \"$before $now\" >> /tmp/clock.bad
        before=${now%.*}
    done
) &
echo RE''ADY
(while cat /tmp/chunk 2> /dev/null; do sleep 0.2; done) | nc 172.30.7.1 PORT | md5sum > /tmp/got
touch /tmp/done
wait
last=$(cat /tmp/last)
echo got=$(sed 's/ .*//' /tmp/got)
echo bad=$(cat /tmp/*.bad 2> /dev/null | wc -l)
echo records=$last
echo written=$(for n in $(seq $last); do echo record $n; done | md5sum)
echo read=$(dd if=$disk bs=512 skip=1 count=$last iflag=direct 2> /dev/null | tr -d '\\0' | md5sum)
echo trouble=$(dmesg | grep -cE 'lockup|BUG:|Oops|Call Trace')
";

/// The guest's peer: sends until it is told to finish, and takes what comes. Returns the sum of what it has sent.
fn exchange(mut stream: TcpStream, finish: &AtomicBool) -> (String, Vec<u8>) {
    let mut reader = stream.try_clone().unwrap();
    let received = std::thread::spawn(move || {
        let mut received = Vec::new();
        // The guest's end of it may be a reset.
        let _ = reader.read_to_end(&mut received);
        received
    });
    let (pieces, mut sent) = (pattern(1 << 20), Vec::new());
    for piece in pieces.chunks(16 << 10).cycle() {
        if finish.load(Relaxed) {
            break;
        }
        stream.write_all(piece).unwrap();
        sent.extend_from_slice(piece);
        std::thread::sleep(Duration::from_millis(100));
    }
    stream.shutdown(Shutdown::Write).unwrap();
    (md5(&sent), received.join().unwrap())
}

fn save(socket: &Path, dir: &Path, more: &[&str]) {
    let mut command = tranche();
    command.args(["snapshot", "create", "--stop"]).args(more).arg(socket).arg(dir);
    Running::start(&mut command).wait(LIMIT).expect_code(0);
}

/// Saves and restores a working guest so many times, and looks at what it has done.
fn goes_through(rounds: u32, arguments: &[&str], more: &[&str]) {
    let tap = Tap::new("tranche-s0", "172.30.7.1/24");
    let listener = TcpListener::bind("172.30.7.1:0").unwrap();
    let mut guest = Guest::new("cloud").cmdline("tranche.ip=172.30.7.2/24,172.30.7.1");
    let path = |name: &str| guest.dir.path().join(name);
    let (socket, disk) = (path("api.sock"), disk_with(guest.dir.path(), "data", &vec![0; 8 << 20]));
    let snapshots = [path("even"), path("odd")];
    guest.command.args(arguments).arg("--api-sock").arg(&socket);
    guest.command.arg("--net").arg(format!("tap={}", tap.0));
    guest.command.arg("--disk").arg(format!("{},id=data", disk.display()));
    let script = WORK.replace("PORT", &listener.local_addr().unwrap().port().to_string());
    let mut running = guest.start(&script);
    running.output.wait_for("READY", LIMIT);
    let finish = Arc::new(AtomicBool::new(false));
    let peer = {
        let (stream, finish) = (accept(&listener), finish.clone());
        std::thread::spawn(move || exchange(stream, &finish))
    };

    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis(1000 + 700 * u64::from(round % 4)));
        // Of the one before, which is what it runs on, nothing may be missed.
        let dir = &snapshots[round as usize % 2];
        if dir.exists() {
            std::fs::remove_dir_all(dir).unwrap();
        }
        save(&socket, dir, more);
        running.wait(LIMIT).expect_code(5);
        let mut restore: Command = tranche();
        running = Running::start(restore.arg("restore").arg(dir).arg("--api-sock").arg(&socket));
        let deadline = Instant::now() + LIMIT;
        while Client::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "no API; errors:\n{}", running.errors.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    std::thread::sleep(Duration::from_secs(2));
    finish.store(true, Relaxed);
    let ended = running.wait(LIMIT).expect_code(0);
    let (sum, received) = peer.join().unwrap();
    let value = |key| value(&ended.output, key);
    assert_eq!(value("got"), sum, "{}", ended.output);
    assert_eq!((value("bad"), value("trouble")), ("0", "0"), "{}", ended.output);
    assert_eq!(value("read"), value("written"), "{}", ended.output);
    assert!(value("records").parse::<u32>().unwrap() > rounds, "{}", ended.output);
    let chunk: String = (1..=3000).map(|n| format!("{n}\n")).collect();
    assert!(received.len() > chunk.len(), "{} bytes", received.len());
    assert!(received.iter().eq(chunk.as_bytes().iter().cycle().take(received.len())), "{} bytes", received.len());
}

/// `TRANCHE_SNAPSHOT_ROUNDS` (5) says how often.
fn rounds() -> u32 {
    std::env::var("TRANCHE_SNAPSHOT_ROUNDS").map_or(5, |rounds| rounds.parse().unwrap())
}

#[test]
fn one_cpu_goes_through_saves_and_restores() {
    goes_through(rounds(), &[], &[]);
}

#[test]
fn four_cpus_go_through_saves_and_restores() {
    goes_through(rounds(), &["--cpus", "4"], &[]);
}

#[test]
fn over_mmio_with_the_disks_where_they_are() {
    goes_through(rounds().div_ceil(2), &["--transport", "mmio"], &["--no-disks"]);
}
