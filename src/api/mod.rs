//! HTTP over a unix socket: how a host agent controls a VM.
//!
//! - [`http`]: requests and answers, and the parser that reads requests out of hostile bytes
//! - [`server`]: one thread that serves up to ten clients and never waits for any of them
//! - [`service`]: which of the two APIs a request is for: [`firecracker`]'s, or ours ([`v2`])
//! - `openapi` (of tests): what docs/openapi.json has to be, which describes both of them
//! - [`relay`]: what stands between clients and the server of a VMM that is jailed
//! - [`client`]: a small blocking client, for the command line

pub mod client;
mod counters;
pub mod firecracker;
pub mod http;
#[cfg(test)]
mod openapi;
pub mod relay;
pub mod server;
pub mod service;
pub mod v2;
