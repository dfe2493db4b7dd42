//! The small kernel of `resources/kernel`: over MMIO, without modules, and without an initrd.
//!
//! `tests/lab/run-tests` leaves this module out, and says so, where that kernel has not been built.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;

use crate::guest::{Guest, LIMIT, assets, value};
use crate::net::{Tap, md5, pattern};

fn small() -> Guest {
    let kernel = assets().join("small/vmlinux");
    assert!(kernel.exists(), "no {}: build it with `make small-kernel`", kernel.display());
    let root = format!("{},ro", assets().join("rootfs.ext4").display());
    Guest::on_kernel(&kernel).arg("--rootfs", root).arg("--transport", "mmio").arg("--cpus", "2")
}

#[test]
fn it_mounts_its_root_and_finds_its_machine() {
    let ended = small()
        .run(
            "
echo release=$(uname -r)
echo root=$(awk '$2 == \"/\" { print $3, substr($4, 1, 2) }' /proc/mounts)
echo modules=$(ls /proc/modules 2> /dev/null | wc -l)
echo pci=$(ls /sys/bus | grep -c pci)
echo cpus=$(nproc)
echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
echo entropy=$(cat /sys/class/misc/hw_random/rng_current)
",
        )
        .expect_code(0);
    assert!(value(&ended.output, "release").ends_with("-tranche"), "{}", ended.output);
    assert_eq!(value(&ended.output, "root"), "ext4 ro");
    assert_eq!(value(&ended.output, "modules"), "0");
    assert_eq!(value(&ended.output, "pci"), "0");
    assert_eq!(value(&ended.output, "cpus"), "2");
    assert_eq!(value(&ended.output, "clock"), "kvm-clock");
    assert!(value(&ended.output, "entropy").starts_with("virtio_rng"), "{}", ended.output);
}

#[test]
fn what_the_network_brings_goes_to_a_disk_and_back() {
    let tap = Tap::new("tranche-s0", "172.30.9.1/24");
    let bytes = pattern(8 << 20);
    let [to_guest, from_guest] = [(); 2].map(|()| TcpListener::bind("172.30.9.1:0").unwrap());
    let ports = [&to_guest, &from_guest].map(|listener| listener.local_addr().unwrap().port());
    let mut guest = small().arg("--net", format!("tap={}", tap.0)).cmdline("tranche.ip=172.30.9.2/24,172.30.9.1");
    let path = guest.dir.path().join("data");
    File::create_new(&path).unwrap().set_len(8 << 20).unwrap();
    guest.command.arg("--disk").arg(format!("{},id=data", path.display()));
    let running = guest.start(&format!(
        "
nc 172.30.9.1 {} < /dev/null | dd of=$(disk data) bs=1M iflag=fullblock conv=fsync 2> /dev/null
echo 3 > /proc/sys/vm/drop_caches
md5sum $(disk data) | sed 's/ .*//; s/^/sum=/'
nc 172.30.9.1 {} < $(disk data); echo sent=$?
",
        ports[0], ports[1]
    ));
    let sum = md5(&bytes);
    let sent = bytes.clone();
    let sender = std::thread::spawn(move || to_guest.accept()?.0.write_all(&sent));
    let receiver = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from_guest.accept()?.0.read_to_end(&mut bytes).map(|_| bytes)
    });
    let ended = running.wait(LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "sum"), sum);
    assert_eq!(value(&ended.output, "sent"), "0");
    sender.join().unwrap().unwrap();
    assert!(receiver.join().unwrap().unwrap() == bytes, "what has arrived is not what was sent");
    assert!(std::fs::read(&path).unwrap() == bytes, "the disk holds something else");
}

#[test]
fn the_power_button_is_heard() {
    small().run_to_the_power_button("true");
}

#[test]
fn a_panic_is_reported() {
    let ended = small().cmdline("root=/dev/vdz").run("true").expect_code(4);
    assert!(ended.output.contains("Unable to mount root fs"), "{}", ended.output);
}
