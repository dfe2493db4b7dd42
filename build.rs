//! What the program carries packed or compiled, and how releases are linked.

#[path = "build/policy.rs"]
mod policy;
#[path = "build/syscalls.rs"]
mod syscalls;

use std::path::Path;
use std::{env, fs, io};

use flate2::Compression;
use flate2::write::DeflateEncoder;

fn main() -> io::Result<()> {
    let directory = |name| env::var(name).map_err(io::Error::other);
    let (top, out) = (directory("CARGO_MANIFEST_DIR")?, directory("OUT_DIR")?);
    for input in ["build.rs", "docs/openapi.json", "resources/no-unwinding.ld"] {
        println!("cargo::rerun-if-changed={input}");
    }

    // Hardly anybody asks for it.
    let document = fs::read(Path::new(&top).join("docs/openapi.json"))?;
    let mut packed = DeflateEncoder::new(Vec::new(), Compression::best());
    io::Write::write_all(&mut packed, &document)?;
    fs::write(Path::new(&out).join("openapi.deflate"), packed.finish()?)?;

    policy::compile();

    if out.contains("/release/build/") {
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{top}/resources/no-unwinding.ld");
        // Functions of the same code are one.
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    }
    Ok(())
}
