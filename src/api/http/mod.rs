//! HTTP/1.1 (RFC 9112) as far as an API on a local socket needs it.

mod parser;
mod request;
mod response;
#[cfg(test)]
mod tests;

pub use self::parser::{MAX_LINE, Malformed, Parsed, Parser};
pub use self::request::{Method, Request, Version};
pub use self::response::{Framing, Response};
