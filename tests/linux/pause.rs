//! A pause, as a guest takes it.

use std::time::Duration;

use tranche::api::client::Client;

use crate::guest::{Guest, LIMIT, value};

/// The guest's watchdog barks when a CPU has not come to it for twice its threshold, which is two seconds here.
#[test]
fn the_watchdog_does_not_take_it_for_a_hang() {
    let mut guest = Guest::new("cloud").arg("--cpus", "2");
    let socket = guest.dir.path().join("api.sock");
    guest = guest.arg("--api-sock", &socket);
    let running = guest.start(
        "
echo 1 > /proc/sys/kernel/watchdog_thresh
echo threshold=$(cat /proc/sys/kernel/watchdog_thresh)
dmesg -c > /dev/null
(while :; do :; done) &
echo RE''ADY
sleep 3
echo AF''TER
echo lockups=$(dmesg | grep -ci lockup)
kill $!
",
    );
    let wish = |state: &str| {
        let body = format!(r#"{{"state":"{state}"}}"#);
        let answer = Client::connect(&socket).unwrap().request("PATCH", "/vm", Some(body.as_bytes())).unwrap();
        assert_eq!(answer.status, 204, "{}", String::from_utf8_lossy(&answer.body));
    };
    running.output.wait_for("READY", LIMIT);
    wish("Paused");
    std::thread::sleep(Duration::from_secs(8));
    assert!(!running.output.text().contains("AFTER"), "it went on");
    wish("Resumed");
    let ended = running.wait(LIMIT).expect_code(0);
    assert_eq!(value(&ended.output, "threshold"), "1");
    assert_eq!(value(&ended.output, "lockups"), "0", "{}", ended.output);
}
