//! One client's connection: what it is busy with, and the bytes that are on their way.
//!
//! ```text
//!             request            answer, all of it out
//!     Open ───────────▶ Asked ─────────────────────────▶ Open
//!       │                 │ stream                         ▲
//!       │                 ├────────────▶ Streaming ────────┘ ended
//!       │ nonsense        │ the last answer
//!       └───────────▶ Closing ───────▶ Draining ──▶ gone
//! ```
//!
//! A connection has one request in hand at a time, and is not read from before its answer is out: so answers keep the
//! order of requests, and a client that sends or asks without reading fills the buffers of its own socket, not ours.

use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use vmm_sys_util::epoll::EventSet;

use super::reply::{Stream, StreamEnd};
use crate::api::http::{Framing, Malformed, Method, Parsed, Parser, Request, Response};

/// Bytes that are read at once.
pub const READ: usize = 8 << 10;

/// Bytes that a client may go on sending after its last answer. While they are read and thrown away, it gets to
/// reading that answer, which it would not if the socket were closed under its hands.
const DRAINED: usize = 4 << 20;

/// An allocation for answers is kept up to so many bytes.
const KEPT: usize = 16 << 10;

#[derive(Clone)]
enum Phase {
    Open,
    /// The service has a request.
    Asked,
    Streaming(Arc<Stream>),
    /// The last answer goes out.
    Closing,
    /// It is out; so many bytes may still come.
    Draining(usize),
    /// The client has left, and the service still has its request. The connection counts until that is answered, so
    /// that the service never has more requests than there may be connections.
    Abandoned,
}

/// There is nothing left to do with a connection.
#[derive(Debug, PartialEq, Eq)]
pub struct Gone;

/// What was found in the bytes of an open connection.
#[derive(Debug)]
pub enum Found {
    /// The service is to be asked.
    Request(Request),
    /// [`Connection::answer`] is to say so.
    Malformed(Malformed),
    Nothing,
}

pub struct Connection {
    pub id: u64,
    socket: OwnedFd,
    phase: Phase,
    parser: Parser,
    /// Read, but not parsed yet: what a client has sent ahead.
    ahead: Vec<u8>,
    /// On their way out, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    /// The answer in hand is the last one.
    close: bool,
    /// The answer in hand has no body.
    head_only: bool,
    /// What the socket is watched for.
    pub watched: EventSet,
    /// One connection too many, which is only told so.
    pub refused: bool,
    /// When the client began what it is to finish: a request, or reading an answer.
    since: Instant,
}

impl Connection {
    pub fn new(id: u64, socket: OwnedFd, max_body: usize) -> Self {
        Self {
            id,
            socket,
            phase: Phase::Open,
            parser: Parser::new(max_body),
            ahead: Vec::new(),
            out: Vec::new(),
            sent: 0,
            close: false,
            head_only: false,
            watched: EventSet::IN,
            refused: false,
            since: Instant::now(),
        }
    }

    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Is it open, with nothing on its way out? Then it may be read from.
    pub fn reads(&self) -> bool {
        matches!(self.phase, Phase::Open) && self.out.is_empty()
    }

    pub fn is_abandoned(&self) -> bool {
        matches!(self.phase, Phase::Abandoned)
    }

    /// For how long the client has left something unfinished.
    pub fn stalled(&self) -> Option<Duration> {
        let unfinished = match self.phase {
            Phase::Open => !self.out.is_empty() || !self.parser.is_idle(),
            Phase::Closing | Phase::Draining(_) => true,
            Phase::Asked | Phase::Streaming(_) | Phase::Abandoned => false,
        };
        unfinished.then(|| self.since.elapsed())
    }

    /// What to watch the socket for. Input that comes too early is ignored only once it has come (`early`), which
    /// spares two system calls with all clients that wait for their answers.
    pub fn interest(&self, early: bool) -> EventSet {
        let writing = if self.out.is_empty() { EventSet::empty() } else { EventSet::OUT };
        match self.phase {
            Phase::Open if self.out.is_empty() => EventSet::IN,
            Phase::Draining(_) => EventSet::IN,
            Phase::Asked | Phase::Streaming(_) if !early => writing | (self.watched & EventSet::IN),
            _ => writing,
        }
    }

    /// Something has happened at the socket of a connection that does not read. [`Gone`] if the client is.
    pub fn ready(&mut self, events: EventSet, scratch: &mut [u8]) -> Result<(), Gone> {
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match &self.phase {
            Phase::Asked if hung_up => {
                self.phase = Phase::Abandoned;
                (self.out, self.ahead) = (Vec::new(), Vec::new());
                Ok(())
            }
            Phase::Streaming(_) if hung_up => Err(Gone),
            Phase::Draining(_) => self.drain(scratch),
            _ => self.flush(),
        }
    }

    /// Reads once. [`Gone`] at the end of what the client sends.
    pub fn read(&mut self, scratch: &mut [u8]) -> Result<Found, Gone> {
        let count = match rustix::net::recv(&self.socket, &mut *scratch, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Gone),
            Ok((count, _)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Found::Nothing),
            Err(_) => return Err(Gone),
        };
        if self.parser.is_idle() {
            self.since = Instant::now();
        }
        let mut input = &scratch[..count];
        let found = self.parse(&mut input)?;
        self.ahead.extend_from_slice(input);
        Ok(found)
    }

    /// The next request of those that the client has sent ahead.
    pub fn next(&mut self) -> Result<Found, Gone> {
        let ahead = mem::take(&mut self.ahead);
        let mut input = ahead.as_slice();
        let found = self.parse(&mut input)?;
        self.ahead = input.to_vec();
        Ok(found)
    }

    fn parse(&mut self, input: &mut &[u8]) -> Result<Found, Gone> {
        while self.reads() {
            match self.parser.feed(input) {
                Ok(None) => break,
                Ok(Some(Parsed::Continue)) => {
                    self.out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                    self.flush()?;
                }
                Ok(Some(Parsed::Request { request, close })) => {
                    self.close = close;
                    self.head_only = matches!(&request.method, Method::Other(name) if name == "HEAD");
                    self.phase = Phase::Asked;
                    return Ok(Found::Request(request));
                }
                Err(malformed) => {
                    *input = &[];
                    self.close = true;
                    self.head_only = false;
                    self.phase = Phase::Asked;
                    return Ok(Found::Malformed(malformed));
                }
            }
        }
        Ok(Found::Nothing)
    }

    /// Answers the request in hand.
    pub fn answer(&mut self, response: &Response) -> Result<(), Gone> {
        if !matches!(self.phase, Phase::Asked) {
            return Err(Gone);
        }
        let framing = if self.head_only { Framing::HeadOnly } else { Framing::Length };
        response.render(framing, self.close, &mut self.out);
        self.end_of_answer()
    }

    /// Tells a client that there are too many of them.
    pub fn refuse(&mut self, response: &Response) -> Result<(), Gone> {
        (self.refused, self.close) = (true, true);
        self.phase = Phase::Asked;
        self.answer(response)
    }

    /// Answers the request in hand with a stream.
    pub fn stream(&mut self, stream: Arc<Stream>) -> Result<(), Gone> {
        if !matches!(self.phase, Phase::Asked) {
            stream.close();
            return Err(Gone);
        }
        self.close |= !stream.chunked;
        let framing = if stream.chunked { Framing::Chunked } else { Framing::UntilClose };
        Response::new(200, stream.content_type, "").render(framing, self.close, &mut self.out);
        self.phase = Phase::Streaming(stream);
        self.flush()
    }

    /// The stream's sender has sent or ended something.
    pub fn stream_moves(&mut self) -> Result<(), Gone> {
        match &self.phase {
            Phase::Streaming(stream) => stream.look(),
            _ => return Ok(()),
        }
        self.flush()
    }

    /// Writes as much as the socket takes, and goes on to what comes after that.
    fn flush(&mut self) -> Result<(), Gone> {
        loop {
            self.write()?;
            if !self.out.is_empty() {
                return Ok(());
            }
            match &self.phase {
                Phase::Streaming(stream) => match stream.take(&mut self.out) {
                    StreamEnd::NotYet if self.out.is_empty() => return Ok(()),
                    StreamEnd::NotYet => {}
                    StreamEnd::Proper => return self.end_of_answer(),
                    StreamEnd::TooSlow => return Err(Gone),
                },
                Phase::Closing => {
                    rustix::net::shutdown(&self.socket, Shutdown::Write).map_err(|_| Gone)?;
                    self.since = Instant::now();
                    self.phase = Phase::Draining(DRAINED);
                    return Ok(());
                }
                _ => return Ok(()),
            }
        }
    }

    /// All of an answer is in `out`.
    fn end_of_answer(&mut self) -> Result<(), Gone> {
        self.since = Instant::now();
        self.phase = if self.close { Phase::Closing } else { Phase::Open };
        self.flush()
    }

    fn write(&mut self) -> Result<(), Gone> {
        while self.sent < self.out.len() {
            match rustix::net::send(&self.socket, &self.out[self.sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
        self.sent = 0;
        self.out.clear();
        self.out.shrink_to(KEPT);
        Ok(())
    }

    fn drain(&mut self, scratch: &mut [u8]) -> Result<(), Gone> {
        let Phase::Draining(left) = &mut self.phase else { return Ok(()) };
        match rustix::net::recv(&self.socket, scratch, RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 && count < *left => *left -= count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            _ => return Err(Gone),
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Phase::Streaming(stream) = &self.phase {
            stream.close();
        }
    }
}
