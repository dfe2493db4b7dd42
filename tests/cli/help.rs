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
        assert!(ended.output.contains("40 to 42 taps"), "{args:?}:\n{}", ended.output);
        assert_eq!(ended.errors, "");
    }
}
