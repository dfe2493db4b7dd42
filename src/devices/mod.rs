//! The virtio devices: [`block`], [`net`], [`rng`]. Each is a [`Front`] that answers the transport, and
//! behind it what serves the queues: [`Engine`](worker::Engine)s on threads of the device's own.

pub mod block;
mod front;
pub mod net;
pub mod rng;
pub mod worker;

#[cfg(test)]
pub(crate) mod conformance;

pub use front::Front;
