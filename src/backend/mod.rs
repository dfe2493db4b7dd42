//! The host side of a device: disk files, taps. Every host resource enters through [`HostFiles`].

pub mod host;

pub use host::{HostFile, HostFiles, OpenDirectly};
