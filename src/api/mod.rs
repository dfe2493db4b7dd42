//! HTTP over a unix socket: how a host agent controls a VM.
//!
//! - [`http`]: requests and answers, and the parser that reads requests out of hostile bytes
//! - [`server`]: one thread that serves up to ten clients and never waits for any of them
//! - [`client`]: a small blocking client, for the command line

pub mod client;
pub mod http;
pub mod server;
