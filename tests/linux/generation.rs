//! The VM generation ID, as Linux's driver takes it.

use crate::guest::{Guest, LIMIT, value};
use crate::support::{Running, tranche};

/// Debian's cloud kernel has no driver for it.
#[test]
fn a_restored_guest_takes_new_random_numbers() {
    let mut guest = Guest::new("generic");
    let (socket, dir) = (guest.dir.path().join("api.sock"), guest.dir.path().join("snap"));
    guest.command.arg("--api-sock").arg(&socket);
    let running = guest.start(
        "
reseeded() { dmesg | grep -c 'reseeded due to virtual machine fork'; }
echo before=$(reseeded)
echo RE''ADY
tries=0
while [ $(reseeded) = 0 ] && [ $tries -lt 300 ]; do sleep 0.2; tries=$((tries + 1)); done
echo after=$(reseeded)
",
    );
    running.output.wait_for("READY", LIMIT);
    let mut save = tranche();
    save.args(["snapshot", "create", "--stop"]).arg(&socket).arg(&dir);
    Running::start(&mut save).wait(LIMIT).expect_code(0);
    let ended = running.wait(LIMIT).expect_code(5);
    assert_eq!(value(&ended.output, "before"), "0");
    // It has been told when it goes on, and would wait for a minute.
    for _ in 0..2 {
        let ended = Running::start(tranche().arg("restore").arg(&dir)).wait(LIMIT).expect_code(0);
        assert_eq!(value(&ended.output, "after"), "1", "{}", ended.output);
    }
}
