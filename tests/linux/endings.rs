//! Power-off, reset, panic and signals end a VM as documented.

use std::time::Duration;

use rustix::process::Signal;

use crate::guest::{Guest, LIMIT};

#[test]
fn a_power_off_ends_with_0() {
    Guest::new("cloud").run("poweroff -f").expect_code(0);
}

#[test]
fn a_reset_ends_with_3() {
    let ended = Guest::new("cloud").run("reboot -f").expect_code(3);
    assert!(ended.errors.contains("reset"), "{}", ended.errors);
    // The keyboard controller's way, too.
    Guest::new("cloud").cmdline("reboot=k").run("reboot -f").expect_code(3);
}

#[test]
fn a_panic_ends_with_4() {
    let ended = Guest::new("cloud").run("echo c > /proc/sysrq-trigger; sleep 60").expect_code(4);
    assert!(ended.errors.contains("panicked"), "{}", ended.errors);
    assert!(ended.output.contains("Kernel panic"), "the guest's last words are there:\n{}", ended.output);
}

#[test]
fn sigterm_presses_the_power_button() {
    Guest::new("cloud").run_to_the_power_button("true");
}

#[test]
fn a_second_sigterm_ends_a_guest_that_does_not_listen() {
    let mut guest = Guest::new("cloud");
    let running = guest.start("killall acpid; echo READY; sleep 600");
    running.output.wait_for("READY", LIMIT);
    running.signal(Signal::TERM);
    std::thread::sleep(Duration::from_secs(1));
    running.signal(Signal::TERM);
    let ended = running.wait(LIMIT).expect_code(5);
    assert!(ended.errors.contains("ended from outside"), "{}", ended.errors);
}

#[test]
fn the_console_takes_input_and_goes_to_files_and_sockets() {
    let mut guest = Guest::new("cloud");
    let mut running = guest.start("echo READY; read line; echo heard=$line");
    running.output.wait_for("READY", LIMIT);
    let long = "x".repeat(500);
    running.send(&format!("{long}\n"));
    let ended = running.wait(LIMIT).expect_code(0);
    assert!(ended.output.contains(&format!("heard={long}")), "{}", ended.output);
    drop(guest);

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("console.log");
    let ended = Guest::new("cloud").arg("--serial", format!("file={}", file.display())).run("echo in-the-file");
    assert_eq!(ended.expect_code(0).output, "");
    assert!(std::fs::read_to_string(&file).unwrap().contains("in-the-file"));

    let path = dir.path().join("console.sock");
    let mut guest = Guest::new("cloud").arg("--serial", format!("socket={}", path.display()));
    let running = guest.start("sleep 2; echo READY; read line; echo heard=$line");
    let mut client = loop {
        match std::os::unix::net::UnixStream::connect(&path) {
            Ok(client) => break client,
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let said = crate::support::Transcript::of(client.try_clone().unwrap());
    said.wait_for("READY", LIMIT);
    std::io::Write::write_all(&mut client, b"hello\n").unwrap();
    said.wait_for("heard=hello", LIMIT);
    running.wait(LIMIT).expect_code(0);
    assert!(!path.exists(), "the socket is gone with the VM");
}
