//! One virtio device per file, each a [`VirtioDevice`](crate::virtio::VirtioDevice): [`Block`], [`Net`], [`Rng`].
//! A device is two things: a front that answers the transport, and an [`Engine`](worker::Engine) that serves
//! the queues on the device's own thread.

mod block;
mod net;
mod rng;
pub mod worker;

#[cfg(test)]
mod conformance;

pub use block::Block;
pub use net::{Net, NetOptions};
pub use rng::Rng;
