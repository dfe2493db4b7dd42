//! How a guest ends, and how it is ended, shows in the exit status.

use rustix::process::Signal;

use crate::guest::{LIMIT, expect_checks, expect_error, guest, output_of, started};
use crate::support::{Running, guests, tranche};

#[test]
fn each_end_of_a_guest_has_its_exit_code() {
    let ends = [
        ("reset", 3, "reset itself"),
        ("keyboard", 3, "reset itself"),
        ("fault", 3, "reset itself"),
        ("panic", 4, "panicked"),
        ("exception", 4, "panicked"),
    ];
    for name in ["hello", "hello-pvh"] {
        for (end, code, text) in ends {
            let ended = Running::start(&mut guest(name, &format!("end={end}"))).wait(LIMIT);
            assert!(ended.output.contains("\nend\n"), "{name} {end}:\n{}", ended.output);
            expect_error(ended, code, text);
        }
        assert!(output_of(&mut guest(name, "end=off")).ends_with("\nend\n"));
    }
}

#[test]
fn the_smallest_guest_says_one_byte() {
    for name in ["tiny", "tiny-pvh"] {
        let mut command = tranche();
        assert_eq!(output_of(command.arg("run").arg("--kernel").arg(guests().join(name))).len(), 1, "{name}");
    }
}

#[test]
fn signals_press_the_power_button() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let running = started(&mut guest("hello", "end=button"), "\nend\n");
        running.signal(signal);
        let ended = running.wait(LIMIT).expect_code(0);
        assert!(ended.output.ends_with("\nend\nbutton\n"), "{signal:?}:\n{}", ended.output);
    }
}

#[test]
fn a_second_signal_ends_a_guest_that_does_not_listen() {
    // One that sleeps, and one that runs in circles.
    for (end, cpus) in [("halt", "1"), ("echo", "1"), ("halt", "64")] {
        let mut command = guest("hello", &format!("end={end}"));
        let running = started(command.args(["--log-level", "debug", "--cpus", cpus]), "\nend\n");
        running.signal(Signal::TERM);
        running.errors.wait_for("running -> stopping", LIMIT);
        running.signal(Signal::TERM);
        expect_error(running.wait(LIMIT), 5, "ended from outside");
    }
}

#[test]
fn the_boot_mark_is_in_the_timeline() {
    let timeline = |cmdline: &str| {
        let ended = Running::start(guest("hello", cmdline).arg("--boot-timeline")).wait(LIMIT).expect_code(0);
        assert_eq!(ended.errors.lines().count(), 8, "{}", ended.errors);
        ended.errors
    };
    let marked = timeline("mark=1");
    let times: Vec<f64> = marked
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().next().unwrap().parse().unwrap_or_else(|_| panic!("not all:\n{marked}")))
        .collect();
    assert!(times.is_sorted() && times[0] > 0.0, "{marked}");
    assert!(marked.lines().last().unwrap().ends_with("userspace (boot mark)"), "{marked}");
    let unmarked = timeline("mark=0");
    assert!(unmarked.lines().last().unwrap().trim_start().starts_with('-'), "{unmarked}");
}

#[test]
fn accesses_of_every_width_find_what_a_pc_has() {
    for name in ["exits", "exits-pvh"] {
        expect_checks(&mut guest(name, "x"), 43);
        expect_checks(guest(name, "x").args(["--memory", "5G", "--cpus", "2"]), 42);
    }
}

#[test]
fn every_cpu_starts_by_init_and_sipi() {
    for (name, cpus, apic) in
        [("smp", 1, "2"), ("smp", 4, "x"), ("smp-pvh", 4, "2"), ("smp", 64, "2"), ("smp-pvh", 64, "x")]
    {
        let mut command = guest(name, &format!("apic={apic}"));
        let output = expect_checks(command.args(["--cpus", &cpus.to_string()]), 2);
        let started: Vec<u32> = output.lines().filter_map(|line| line.strip_prefix("cpu=")?.parse().ok()).collect();
        assert_eq!(started, (0..cpus).collect::<Vec<_>>(), "{output}");
        let found = if apic == "x" { "apic=xapic" } else { "apic=x2apic" };
        assert!(output.contains(found), "{output}");
    }
}
