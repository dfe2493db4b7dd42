//! Kernels of distributions, imported once and booted by name.
//!
//! A bundle is a directory in the user's library: the unpacked kernel, an initrd with the modules that a guest needs,
//! and a manifest. It is written beside its final name and renamed, so that it is there whole or not at all.

mod error;
mod import;
mod initrd;
mod library;
pub(crate) mod modinfo;
pub(crate) mod modules;
pub(crate) mod package;
pub(crate) mod tree;

pub use error::{Flaw, KernelsError};
pub use import::{Source, import};
pub use library::{Bundle, Library, Manifest};
