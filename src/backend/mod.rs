//! The host side of a device: disk files, taps, vhost, passt, rate limiters. Every host resource enters through [`HostFiles`].

pub mod descriptors;
pub mod disk;
pub mod frames;
pub mod host;
pub mod io_error;
pub mod kernel_cache;
pub mod limiter;
pub mod netns;
pub mod passt;
mod patience;
pub mod tap;
pub mod vhost;

pub use disk::{Disk, DiskError};
pub use host::{Deed, HostFile, HostFiles, OpenDirectly, Right};
pub use kernel_cache::KernelCache;
pub use limiter::{Budget, Limiter};
pub use passt::{Passt, PasstError};
pub use tap::{Offloads, Tap, TapError};
pub use vhost::{VhostError, VhostNet};
