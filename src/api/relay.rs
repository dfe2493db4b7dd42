//! The API's front when the VMM is jailed: clients connect to the parent, which reads their requests along the way.
//!
//! What a request names, the VMM may have; so that one that a guest has taken over cannot say by itself what a client
//! wants. Bytes are passed on as they come, in both directions, and answered by the VMM's own server.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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
        // With nothing else to be told of, one that hangs up for good. It would be told of again and again, if the other
        // half had not taken yet what it has sent.
        flags.set(PollFlags::HUP, self.ended && other.pending.is_empty());
        flags
    }

    /// The socket as poll is to look at it, in place of which it looks at `quiet` if there is nothing to wait for.
    fn wanted<'a>(&'a self, other: &Self, quiet: BorrowedFd<'a>) -> PollFd<'a> {
        match self.interest(other) {
            none if none.is_empty() => PollFd::from_borrowed_fd(quiet, none),
            interest => PollFd::from_borrowed_fd(self.socket.as_fd(), interest),
        }
    }

    /// Reads once; nothing when there is nothing, or no more.
    fn read<'a>(&mut self, buffer: &'a mut [u8]) -> Result<&'a [u8], Errno> {
        match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => {
                self.ended = true;
                Ok(&[])
            }
            Ok((count, _)) => Ok(&buffer[..count]),
            // It has gone, and left unread what was sent to it.
            Err(Errno::CONNRESET) => {
                self.ended = true;
                Ok(&[])
            }
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
        let listener = self.listener.as_fd();
        let halves = self.links.iter().flat_map(|Link { client, vmm, .. }| {
            // Of a listener, poll tells nothing that it was not asked for.
            [client.wanted(vmm, listener), vmm.wanted(client, listener)]
        });
        std::iter::once(PollFd::from_borrowed_fd(listener, listens)).chain(halves).collect()
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
        if self.pass_requests(client, vmm, named).is_err() {
            // The server reads no more, after what is no request say. What it has answered is still to be passed on.
            self.vmm.pending.clear();
            self.client.ended = true;
        }
        if self.pass_answers(client, vmm).is_err() {
            return false;
        }
        let has_left = self.client.ended && client.contains(PollFlags::HUP) && self.vmm.pending.is_empty();
        let is_answered = self.vmm.ended && self.client.pending.is_empty();
        !has_left && !is_answered
    }

    /// # Errors
    /// When the VMM's end takes nothing more, or the client's cannot be read.
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

    /// # Errors
    /// When the client takes nothing more, or the VMM's end cannot be read.
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustix::net::{AddressFamily, SocketType, socketpair};

    use super::*;
    use crate::backend::descriptors;

    /// A relay, with a client that it has taken and the VMM's end for it.
    struct Rig {
        relay: Relay,
        client: UnixStream,
        vmm: UnixStream,
        _dir: tempfile::TempDir,
        _server: OwnedFd,
    }

    impl Rig {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("s");
            let listener = UnixListener::bind(&path).unwrap();
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            let mut relay = Relay::new(listener, ours, 1000).unwrap();
            let client = UnixStream::connect(&path).unwrap();
            assert_eq!(turn(&mut relay), 1);
            let (_, mut passed) = descriptors::receive(&theirs, &mut [0], RecvFlags::empty()).unwrap();
            let vmm = UnixStream::from(passed.remove(0));
            Self { relay, client, vmm, _dir: dir, _server: theirs }
        }

        /// Goes on until there is nothing to be done.
        #[track_caller]
        fn settle(&mut self) {
            assert!((0..10_000).any(|_| turn(&mut self.relay) == 0), "it never comes to rest");
        }
    }

    /// Goes on with what is ready now; how much is?
    fn turn(relay: &mut Relay) -> usize {
        let mut wanted = relay.wanted();
        let count = poll(&mut wanted, Some(&Timespec::default())).unwrap();
        let ready: Vec<_> = wanted.iter().map(PollFd::revents).collect();
        drop(wanted);
        relay.go_on(&ready, &mut |_| {});
        count
    }

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

    fn read(stream: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_client_that_has_left_is_forgotten_when_its_request_is_passed_on() {
        let mut rig = Rig::new();
        rig.client.write_all(REQUEST).unwrap();
        drop(rig.client);
        rig.client = UnixStream::pair().unwrap().0;
        rig.settle();
        assert!(rig.relay.links.is_empty());
        let mut passed = Vec::new();
        rig.vmm.read_to_end(&mut passed).unwrap();
        assert_eq!(passed, REQUEST);
    }

    #[test]
    fn a_client_that_sends_no_more_is_answered() {
        let mut rig = Rig::new();
        rig.client.write_all(REQUEST).unwrap();
        rig.client.shutdown(std::net::Shutdown::Write).unwrap();
        rig.settle();
        let mut passed = Vec::new();
        rig.vmm.read_to_end(&mut passed).unwrap();
        assert_eq!(passed, REQUEST);
        rig.vmm.write_all(b"answer").unwrap();
        rig.settle();
        assert_eq!((read(&mut rig.client, 6).as_slice(), rig.relay.links.len()), (&b"answer"[..], 1));
    }

    /// A client that leaves while the VMM takes in nothing: its bytes are kept, and nobody is woken for it.
    #[test]
    fn a_client_that_has_left_wakes_nobody() {
        let mut rig = Rig::new();
        rig.client.set_nonblocking(true).unwrap();
        let mut sent = 0;
        // As long as the VMM's socket takes something, and the client's own.
        while rig.relay.links[0].vmm.pending.is_empty() || rig.client.write(&[7; 512]).is_ok() {
            sent += rig.client.write(&[7; 512]).unwrap_or(0);
            turn(&mut rig.relay);
        }
        assert!(sent > 0);
        drop(std::mem::replace(&mut rig.client, UnixStream::pair().unwrap().0));
        rig.settle();
        assert_eq!(rig.relay.links.len(), 1);
        let mut reader = rig.vmm.try_clone().unwrap();
        let taken = std::thread::spawn(move || reader.read_to_end(&mut Vec::new()).unwrap());
        while !rig.relay.links.is_empty() {
            turn(&mut rig.relay);
        }
        assert!(taken.join().unwrap() >= sent);
    }

    /// A server that hangs up, with an answer that the client does not read yet.
    #[test]
    fn an_answer_waits_for_its_client() {
        let mut rig = Rig::new();
        let answer: Vec<u8> = (0..1_000_000).map(|index| (index % 251) as u8).collect();
        rig.vmm.set_nonblocking(true).unwrap();
        let mut sent = 0;
        loop {
            match rig.vmm.write(&answer[sent..]) {
                Ok(count) => sent += count,
                Err(_) if !rig.relay.links[0].client.pending.is_empty() => break,
                Err(_) => drop(turn(&mut rig.relay)),
            }
        }
        rig.client.write_all(b"what is no more read").unwrap();
        rig.settle();
        drop(std::mem::replace(&mut rig.vmm, UnixStream::pair().unwrap().0));
        rig.settle();
        assert_eq!(rig.relay.links.len(), 1, "the answer is not all taken");
        let mut client = rig.client.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let mut taken = Vec::new();
            // It left something unread of ours, which the socket tells at its end.
            let _ = client.read_to_end(&mut taken);
            taken
        });
        while !rig.relay.links.is_empty() {
            turn(&mut rig.relay);
        }
        assert!(reader.join().unwrap() == answer[..sent]);
    }
}
