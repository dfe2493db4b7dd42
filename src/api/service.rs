//! Both APIs behind one socket.

use super::http::{Request, Response};
use super::server::{Reply, Service};
use super::{firecracker, v2};
use crate::control::CallSender;

/// What the server calls.
pub struct Api {
    owner: CallSender,
}

impl Api {
    #[must_use]
    pub fn new(owner: CallSender) -> Self {
        Self { owner }
    }
}

impl Service for Api {
    fn call(&mut self, request: Request, reply: Reply) {
        match request.path.split(['/', '?']).nth(1) {
            Some("v2") => v2::serve(&request, reply, &self.owner),
            _ => firecracker::serve(&request, reply, &self.owner),
        }
    }

    fn malformed(&self, status: u16, text: &str) -> Response {
        firecracker::fault(status, text)
    }
}
