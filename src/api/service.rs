//! Both APIs behind one socket.

use std::sync::Arc;

use super::counters::ApiCounters;
use super::http::{Request, Response};
use super::server::{Reply, Service};
use super::{firecracker, v2};
use crate::control::{ApiCounts, CallSender};

/// What the server calls.
pub struct Api {
    owner: CallSender,
    counters: Arc<ApiCounters>,
}

impl Api {
    #[must_use]
    pub fn new(owner: CallSender) -> Self {
        Self { owner, counters: Arc::default() }
    }

    /// What is counted here, for whoever shows it.
    #[must_use]
    pub fn counts(&self) -> ApiCounts {
        let counters = self.counters.clone();
        Arc::new(move || counters.counts())
    }
}

impl Service for Api {
    fn call(&mut self, request: Request, reply: Reply) {
        match request.path.split(['/', '?']).nth(1) {
            Some("v2") => v2::serve(&request, reply, &self.owner),
            _ => firecracker::serve(&request, reply, &self.owner, &self.counters),
        }
    }

    fn malformed(&self, status: u16, text: &str) -> Response {
        firecracker::fault(status, text)
    }
}

#[cfg(test)]
mod tests;
