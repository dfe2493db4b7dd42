//! Devices that come and go while a guest runs: it notices by itself, through ACPI.

use std::time::{Duration, Instant};

use tranche::api::client::Client;

use crate::guest::{Guest, LIMIT};
use crate::net::Tap;
use crate::support::disk_with;

/// Each line of input is a command; what it answers ends with a word that no command has in it.
const SHELL: &str = "mdev -s 2> /dev/null; echo RE''ADY; while read -r line; do eval \"$line\"; done";

#[test]
fn disks_and_cards_come_and_go_without_a_rescan() {
    let mut guest = Guest::new("cloud");
    let socket = guest.dir.path().join("api.sock");
    let (disk, other) = (guest.dir.path().join("plugged"), guest.dir.path().join("other"));
    disk_with(guest.dir.path(), "plugged", &[b'p'; 2 << 20]);
    disk_with(guest.dir.path(), "other", &[b'o'; 4 << 20]);
    let tap = Tap::new("tranche-plug", "172.30.12.1/24");
    guest = guest.arg("--api-sock", &socket);
    let mut running = guest.start(SHELL);
    running.output.wait_for("READY", LIMIT);

    let ask = |method: &str, path: &str, body: Option<String>| {
        let mut client = Client::connect(&socket).unwrap();
        let answer = client.request(method, path, body.as_deref().map(str::as_bytes)).unwrap();
        assert!([200, 204].contains(&answer.status), "{}", String::from_utf8_lossy(&answer.body));
        String::from_utf8(answer.body).unwrap()
    };
    // The guest looks until it is so, and says then.
    let mut step = 0;
    let mut becomes = |running: &mut crate::support::Running, condition: &str| {
        step += 1;
        running.send(&format!("until {condition}; do sleep 0.2; done; echo STEP''{step}.\n"));
        running.output.wait_for(&format!("STEP{step}."), LIMIT);
    };
    // Past the guest's cache, which may have seen the disk before.
    let sectors = |count: u32, contents: char| {
        let read = "dd if=/dev/vdc bs=4096 count=1 iflag=direct 2> /dev/null | head -c 1";
        format!("grep -qsx {count} /sys/block/vdc/size && [ \"$({read})\" = {contents} ]")
    };

    ask("PUT", "/drives/hot", Some(format!(r#"{{"drive_id":"hot","is_root_device":false,"path_on_host":{disk:?}}}"#)));
    becomes(&mut running, &sectors(4096, 'p'));
    ask("PATCH", "/drives/hot", Some(format!(r#"{{"drive_id":"hot","path_on_host":{other:?}}}"#)));
    becomes(&mut running, &sectors(8192, 'o'));

    let nic = format!(r#"{{"iface_id":"hot","host_dev_name":"{}","guest_mac":"02:00:00:00:00:77"}}"#, tap.0);
    ask("PUT", "/network-interfaces/hot", Some(nic));
    becomes(&mut running, "grep -qs 02:00:00:00:00:77 /sys/class/net/*/address");

    ask("DELETE", "/drives/hot", None);
    ask("DELETE", "/network-interfaces/hot", None);
    becomes(&mut running, "! [ -e /sys/block/vdc ]");
    becomes(&mut running, "! grep -qs 02:00:00:00:00:77 /sys/class/net/*/address");
    // Both are gone here, too, and their places and names are free.
    let deadline = Instant::now() + LIMIT;
    while ask("GET", "/v2/vm", None).contains("leaving") {
        assert!(Instant::now() < deadline, "a device is still leaving");
        std::thread::sleep(Duration::from_millis(100));
    }
    ask("PUT", "/drives/hot", Some(format!(r#"{{"drive_id":"hot","is_root_device":false,"path_on_host":{disk:?}}}"#)));
    becomes(&mut running, &sectors(4096, 'p'));
    running.send("poweroff -f\n");
    running.wait(LIMIT).expect_code(0);
}
