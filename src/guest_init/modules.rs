//! Loads the kernel modules that the initrd brings.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use rustix::system::init_module;

use super::{Failure, doing};

/// Where the modules are, each an LZ4 block behind its size: unpacking all of an initrd costs more time than unpacking
/// what is needed of it.
pub const DIR: &str = "/modules";

/// Lines `GROUP FILE`: what to load for what, dependencies first.
pub const ORDER: &str = "order";

/// The group that every guest needs. The others are called as their file system is.
pub const BASE: &str = "base";

/// Loads the modules of a group; those that are there already stay.
pub fn load(group: &str) -> Result<(), Failure> {
    let list = fs::read_to_string(Path::new(DIR).join(ORDER)).map_err(doing("read the list of modules"))?;
    for name in list.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(' ')) {
        let packed = fs::read(Path::new(DIR).join(name)).map_err(doing(format_args!("read the module {name}")))?;
        let module = lz4_flex::decompress_size_prepended(&packed);
        match init_module(&module.map_err(doing(format_args!("unpack the module {name}")))?, c"") {
            // Some modules are for devices that a machine need not have. If one was needed, what needs it will say so.
            Ok(()) | Err(Errno::EXIST | Errno::NODEV | Errno::NXIO | Errno::NOENT) => {}
            Err(error) => eprintln!("tranche init: module {name}: {error}"),
        }
    }
    Ok(())
}
