//! What the program says of itself.

use crate::mistake::LIMIT;
use crate::support::{Running, tranche};

#[test]
fn the_version_is_that_of_the_package() {
    let ended = Running::start(tranche().arg("--version")).wait(LIMIT).expect_code(0);
    assert_eq!(ended.output, format!("tranche {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_tells_the_exit_status() {
    for args in [&["help"][..], &["--help"], &["help", "run"], &["run", "--help"], &["run", "-h"]] {
        let ended = Running::start(tranche().args(args)).wait(LIMIT).expect_code(0);
        assert!(ended.output.contains("Exit status: 0 the guest powered off"), "{args:?}:\n{}", ended.output);
        assert!(ended.output.contains("40 to 43 networks"), "{args:?}:\n{}", ended.output);
        assert_eq!(ended.errors, "");
    }
}

#[test]
fn verbs_that_are_parsed_alone_say_the_same() {
    for verb in ["run", "vmm", "restore"] {
        let said = |args: &[&str]| Running::start(tranche().args(args)).wait(LIMIT).expect_code(0).output;
        assert_eq!(said(&[verb, "--help"]), said(&["help", verb]));
        assert!(said(&[verb, "--help"]).contains(&format!("Usage: tranche {verb} ")));
        let wrong = Running::start(tranche().args([verb, "--no-such"])).wait(LIMIT).expect_code(2);
        assert!(wrong.errors.contains("unexpected argument '--no-such'"), "{}", wrong.errors);
        assert!(wrong.errors.contains(&format!("Usage: tranche {verb} ")), "{}", wrong.errors);
    }
}
