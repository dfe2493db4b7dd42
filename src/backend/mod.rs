//! The host side of a device: disk files, taps, vhost. Every host resource enters through [`HostFiles`].

pub mod disk;
pub mod host;
pub mod tap;
pub mod vhost;

pub use disk::{Disk, DiskError};
pub use host::{HostFile, HostFiles, OpenDirectly};
pub use tap::{Offloads, Tap, TapError};
pub use vhost::{VhostError, VhostNet};
