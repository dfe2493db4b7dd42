//! The API's front when the VMM is jailed: clients connect to the parent, which reads their requests along the way.
//!
//! What a request names, the VMM may have; so that one that a guest has taken over cannot say by itself what a client
//! wants. Bytes are passed on as they come, in both directions, and answered by the VMM's own server.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};

use super::http::{Parsed, Parser, Request};
use super::server::pass_client;
use super::{firecracker, v2};
use crate::control::Call;

/// Clients at a time; others wait. The VMM's server has fewer, and says so to those that are too many.
const MOST_CLIENTS: usize = 32;

/// Bytes that are passed on at once.
const CHUNK: usize = 8 << 10;

pub struct Relay {
    listener: UnixListener,
    /// Where the VMM's server hears of clients.
    server: OwnedFd,
    max_body: usize,
    links: Vec<Link>,
}

/// A client, and the VMM's end for it.
struct Link {
    client: Half,
    vmm: Half,
    /// None after what is no request: the server answers it, and reads no more.
    parser: Option<Parser>,
}

/// A socket, and what it has not taken yet.
struct Half {
    socket: OwnedFd,
    pending: Vec<u8>,
    /// The other one sends no more.
    ends: bool,
    /// It sends no more itself.
    ended: bool,
}

impl Half {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, pending: Vec::new(), ends: false, ended: false }
    }

    /// What to wait for, if the other half takes what this one sends.
    fn interest(&self, other: &Self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.ended && other.pending.is_empty());
        flags.set(PollFlags::OUT, !self.pending.is_empty());
        flags
    }

    /// Reads once; nothing when there is nothing, or no more.
    fn read<'a>(&mut self, buffer: &'a mut [u8]) -> Result<&'a [u8], Errno> {
        match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => {
                self.ended = true;
                Ok(&[])
            }
            Ok((count, _)) => Ok(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => Ok(&[]),
            Err(error) => Err(error),
        }
    }

    fn write(&mut self) -> Result<(), Errno> {
        while !self.pending.is_empty() {
            match rustix::net::send(&self.socket, &self.pending, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        if self.ends {
            rustix::net::shutdown(&self.socket, Shutdown::Write)?;
        }
        Ok(())
    }
}

impl Relay {
    /// Takes clients from `listener`, and hands them to a server at the other end of `server`.
    ///
    /// # Errors
    /// The host's.
    pub fn new(listener: UnixListener, server: OwnedFd, max_body: usize) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, server, max_body, links: Vec::new() })
    }

    /// What to wait for: the listener, and two sockets for each client.
    #[must_use]
    pub fn wanted(&self) -> Vec<PollFd<'_>> {
        let listens = if self.links.len() < MOST_CLIENTS { PollFlags::IN } else { PollFlags::empty() };
        let mut wanted = vec![PollFd::from_borrowed_fd(self.listener.as_fd(), listens)];
        for Link { client, vmm, .. } in &self.links {
            wanted.push(PollFd::from_borrowed_fd(client.socket.as_fd(), client.interest(vmm)));
            wanted.push(PollFd::from_borrowed_fd(vmm.socket.as_fd(), vmm.interest(client)));
        }
        wanted
    }

    /// Passes on what is still to be passed on, for so many milliseconds at most: the VMM is gone.
    pub fn finish(&mut self, patience: i64) {
        let deadline = Instant::now() + Duration::from_millis(patience.unsigned_abs());
        while !self.links.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut wanted = self.wanted();
            // Nobody is to come any more.
            wanted.remove(0);
            if left.is_zero() || !poll(&mut wanted, Some(&timeout)).is_ok_and(|ready| ready > 0) {
                return;
            }
            let mut ready = vec![PollFlags::empty()];
            ready.extend(wanted.iter().map(PollFd::revents));
            drop(wanted);
            self.go_on(&ready, &mut |_| {});
        }
    }

    /// Goes on with what is ready, in the order of [`Self::wanted`]; `named` hears of each call before the VMM does.
    pub fn go_on(&mut self, ready: &[PollFlags], named: &mut dyn FnMut(&Call)) {
        let Some((listener, halves)) = ready.split_first() else { return };
        let mut halves = halves.chunks_exact(2);
        self.links.retain_mut(|link| match halves.next() {
            Some([client, vmm]) => link.go_on(*client, *vmm, named),
            _ => true,
        });
        if listener.contains(PollFlags::IN) {
            // What cannot be accepted now is there again next time.
            if let Err(error) = self.accept() {
                tracing::debug!("a client of the API cannot be accepted: {error}");
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let client = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC)?;
        let (ours, theirs) = UnixStream::pair()?;
        pass_client(&self.server, theirs.as_fd())?;
        let parser = Some(Parser::new(self.max_body));
        self.links.push(Link { client: Half::new(client), vmm: Half::new(ours.into()), parser });
        Ok(())
    }
}

impl Link {
    /// `false` when there is nothing left to pass on.
    fn go_on(&mut self, client: PollFlags, vmm: PollFlags, named: &mut dyn FnMut(&Call)) -> bool {
        let done = self.pass_requests(client, vmm, named).and_then(|()| self.pass_answers(client, vmm));
        done.is_ok() && !(self.client.ended && self.vmm.ended) && !(self.vmm.ended && self.client.pending.is_empty())
    }

    fn pass_requests(&mut self, client: PollFlags, vmm: PollFlags, named: &mut dyn FnMut(&Call)) -> Result<(), Errno> {
        if self.vmm.pending.is_empty() && !self.client.ended && !client.is_empty() {
            let mut buffer = [0; CHUNK];
            let bytes = self.client.read(&mut buffer)?;
            look(&mut self.parser, bytes, named);
            self.vmm.pending.extend_from_slice(bytes);
            self.vmm.ends = self.client.ended;
            return self.vmm.write();
        }
        if vmm.contains(PollFlags::OUT) { self.vmm.write() } else { Ok(()) }
    }

    fn pass_answers(&mut self, client: PollFlags, vmm: PollFlags) -> Result<(), Errno> {
        if self.client.pending.is_empty() && !self.vmm.ended && !vmm.is_empty() {
            let mut buffer = [0; CHUNK];
            let bytes = self.vmm.read(&mut buffer)?;
            self.client.pending.extend_from_slice(bytes);
            self.client.ends = self.vmm.ended;
            return self.client.write();
        }
        if client.contains(PollFlags::OUT) { self.client.write() } else { Ok(()) }
    }
}

/// Looks for requests in what a client sends.
fn look(parser: &mut Option<Parser>, mut bytes: &[u8], named: &mut dyn FnMut(&Call)) {
    while let Some(known) = parser {
        match known.feed(&mut bytes) {
            Ok(None) => return,
            Ok(Some(Parsed::Continue)) => {}
            Ok(Some(Parsed::Request { request, .. })) => {
                if let Some(call) = call_of(&request) {
                    named(&call);
                }
            }
            Err(_) => *parser = None,
        }
    }
}

/// What a request asks of the owner, if it does.
fn call_of(request: &Request) -> Option<Call> {
    match request.path.split(['/', '?']).nth(1) {
        Some("v2") => v2::call_of(request),
        _ => Some(firecracker::route(&request.method, &request.path, &request.body).ok()?.call),
    }
}
