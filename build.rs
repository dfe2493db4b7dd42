//! What is linked into releases, and only there.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=resources/no-unwinding.ld");
    let is_release = env::var("OUT_DIR").is_ok_and(|dir| dir.contains("/release/build/"));
    if is_release {
        let top = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{top}/resources/no-unwinding.ld");
    }
}
