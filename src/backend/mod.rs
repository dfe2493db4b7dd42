//! The host side of a device: disk files, taps, vhost, passt, rate limiters. Every host resource enters through [`HostFiles`].

pub mod disk;
pub mod frames;
pub mod host;
pub mod limiter;
pub mod netns;
pub mod passt;
pub mod tap;
pub mod vhost;

pub use disk::{Disk, DiskError};
pub use host::{HostFile, HostFiles, OpenDirectly};
pub use limiter::Limiter;
pub use passt::{Passt, PasstError};
pub use tap::{Offloads, Tap, TapError};
pub use vhost::{VhostError, VhostNet};
