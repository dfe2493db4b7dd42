//! The thread that serves clients on a unix socket, and never waits for any of them, nor for the service.
//!
//! It sleeps in `epoll_wait` until a client sends something, a socket has room again, or an answer comes from another
//! thread. A request whose answer is there at once takes three system calls: `epoll_wait`, `recv`, `send`.

mod connection;
mod reply;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use self::connection::{Connection, Found, Gone, READ};
#[cfg(test)]
pub use self::reply::Replied;
use self::reply::{Mail, Next, Post};
pub use self::reply::{Reply, STREAM_BUFFER, StreamError, StreamSender};
use super::http::{Request, Response};
use crate::backend::descriptors;
use crate::threads::{self, Kind};

/// What stands for the listener and the bell where connections have their numbers.
const LISTENER: u64 = 0;
const BELL: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// Clients too many that are just being told so. Of more, the one that was told first is cut off.
const REFUSED: usize = 4;

/// Milliseconds until another client is accepted, when there were no descriptors left for one.
const PAUSE: i32 = 100;

/// What answers requests. All calls come from the server's thread and must not wait for anything.
pub trait Service: Send + 'static {
    /// A request. The reply is given at once, or later and from any thread; until then, the client's next request
    /// is not looked at.
    fn call(&mut self, request: Request, reply: Reply);

    /// What to answer when there is no request to be answered by [`Self::call`]: it is malformed (400), there are too
    /// many clients (503), or a reply was dropped (500).
    fn malformed(&self, status: u16, text: &str) -> Response;
}

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a request's body.
    pub max_body: usize,
    /// Clients at a time; one more is answered 503.
    pub connections: usize,
    /// How long a client may leave a request or the reading of an answer unfinished and keep others out. Looked at
    /// only when there is one client too many.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_body: 51_200, connections: 10, patience: Duration::from_secs(30) }
    }
}

/// Where clients come from.
pub enum Clients {
    Listener(UnixListener),
    /// Another process accepts them and hands them over, one a message; see [`pass_client`].
    Passed(OwnedFd),
}

impl AsFd for Clients {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listener(listener) => listener.as_fd(),
            Self::Passed(socket) => socket.as_fd(),
        }
    }
}

impl Clients {
    fn next(&self) -> rustix::io::Result<OwnedFd> {
        match self {
            Self::Listener(listener) => rustix::net::accept_with(listener, SocketFlags::CLOEXEC),
            Self::Passed(socket) => {
                let received = descriptors::receive(socket, &mut [0], RecvFlags::DONTWAIT);
                let (_, clients) =
                    received.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::CONNABORTED))?;
                clients.into_iter().next_back().ok_or(Errno::CONNABORTED)
            }
        }
    }
}

/// Hands a client over to a server of another process.
///
/// # Errors
/// The host's; `WouldBlock` when too many wait there.
pub fn pass_client(server: &OwnedFd, client: BorrowedFd<'_>) -> io::Result<()> {
    descriptors::send(server, &[0], &[client], SendFlags::DONTWAIT)
}

pub struct Server<S> {
    clients: Clients,
    epoll: Epoll,
    post: Arc<Post>,
    limits: Limits,
    service: S,
    connections: Vec<Connection>,
    next_id: u64,
    /// Is the listener watched?
    accepts: bool,
    /// Has it been said that clients cannot be accepted?
    said: bool,
    scratch: Vec<u8>,
}

/// A running server. Dropping it stops the server, as [`Self::stop`] does.
pub struct ServerHandle {
    post: Arc<Post>,
    thread: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// Ends the thread, after what has been answered is with the clients' sockets, as far as they take it: what is to
    /// be called before the process ends.
    pub fn stop(self) {}
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.post.stop();
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported.
            let _ = thread.join();
        }
    }
}

impl<S: Service> Server<S> {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there are no descriptors or threads to be had.
    pub fn spawn(clients: Clients, thread_name: &str, limits: Limits, service: S) -> io::Result<ServerHandle> {
        // A client may have left before it is accepted.
        rustix::io::ioctl_fionbio(&clients, true)?;
        let post = Arc::new(Post::new()?);
        let epoll = Epoll::new()?;
        watch(&epoll, ControlOperation::Add, clients.as_fd().as_raw_fd(), EventSet::IN, LISTENER)?;
        let bell = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(&epoll, ControlOperation::Add, post.bell().as_raw_fd(), bell, BELL)?;
        let connections = Vec::new();
        let handle = Arc::clone(&post);
        let server = Self {
            clients,
            epoll,
            post,
            limits,
            service,
            connections,
            next_id: FIRST_CONNECTION,
            accepts: true,
            said: false,
            scratch: Vec::new(),
        };
        let thread = threads::spawn(Kind::Api, thread_name, None, move || server.run())?;
        Ok(ServerHandle { post: handle, thread: Some(thread) })
    }

    fn run(mut self) {
        let mut letters = Vec::new();
        self.scratch = vec![0; READ];
        let mut events = [EpollEvent::default(); 16];
        loop {
            self.deliver_all(&mut letters);
            match self.post.next() {
                Next::Letters => continue,
                Next::Sleep => {}
                Next::Stop => return,
            }
            let paused = !self.accepts;
            let count = self.epoll.wait(if paused { PAUSE } else { -1 }, &mut events);
            self.post.awake();
            match count {
                Ok(count) => {
                    // The listener last: who has left makes room for who comes.
                    events[..count].sort_unstable_by_key(|event| event.data() == LISTENER);
                    for event in &events[..count] {
                        self.happens(event);
                        self.deliver_all(&mut letters);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return tracing::error!("the API ends, as epoll fails: {error}"),
            }
            if paused {
                self.accept_again(true);
            }
        }
    }

    fn deliver_all(&mut self, letters: &mut Vec<(u64, Mail)>) {
        while self.post.take(letters) {
            letters.drain(..).for_each(|(id, mail)| self.deliver(id, mail));
        }
    }

    fn happens(&mut self, event: &EpollEvent) {
        match event.data() {
            // Letters are looked for anyway.
            BELL => {}
            LISTENER => self.accept(),
            id => self.with(id, Some(event.event_set()), |connection, service, post, scratch| {
                if !connection.reads() {
                    connection.ready(event.event_set(), scratch)?;
                    return ask(connection, Connection::next, service, post);
                }
                ask(connection, |connection| connection.read(scratch), service, post)
            }),
        }
    }

    fn deliver(&mut self, id: u64, mail: Mail) {
        self.with(id, None, |connection, service, post, _| {
            match mail {
                Mail::Answer(response) => connection.answer(&response)?,
                Mail::Unanswered => {
                    connection.answer(&service.malformed(500, "The request was not answered."))?;
                }
                Mail::Stream(stream) => connection.stream(stream)?,
                Mail::StreamMoves => connection.stream_moves()?,
            }
            ask(connection, Connection::next, service, post)
        });
    }

    /// Does something with a connection that is still there, and then what the outcome calls for.
    fn with(
        &mut self,
        id: u64,
        events: Option<EventSet>,
        work: impl FnOnce(&mut Connection, &mut S, &Arc<Post>, &mut [u8]) -> Result<(), Gone>,
    ) {
        let Some(index) = self.connections.iter().position(|connection| connection.id == id) else { return };
        let connection = &mut self.connections[index];
        let early = !connection.reads() && events.is_some_and(|events| events.contains(EventSet::IN));
        let done = work(connection, &mut self.service, &self.post, &mut self.scratch);
        match done {
            Err(Gone) => {
                // Closing the socket ends its being watched.
                self.connections.swap_remove(index);
            }
            Ok(()) if connection.is_abandoned() => {
                // It would be reported for ever.
                let _ = watch(&self.epoll, ControlOperation::Delete, connection.fd(), EventSet::empty(), id);
            }
            Ok(()) => {
                let interest = connection.interest(early);
                if interest != connection.watched {
                    connection.watched = interest;
                    if watch(&self.epoll, ControlOperation::Modify, connection.fd(), interest, id).is_err() {
                        self.connections.swap_remove(index);
                    }
                }
            }
        }
    }

    fn accept(&mut self) {
        let socket = match self.clients.next() {
            Ok(socket) => {
                self.said = false;
                socket
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Err(error) => {
                if !std::mem::replace(&mut self.said, true) {
                    tracing::warn!("a client of the API cannot be accepted yet: {error}");
                }
                // It would be announced for ever.
                return self.accept_again(false);
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        let mut connection = Connection::new(id, socket, self.limits.max_body);
        if !self.makes_room() {
            let text = format!("There are {} connections already, which is the limit.", self.limits.connections);
            if connection.refuse(&self.service.malformed(503, &text)).is_err() {
                return;
            }
        }
        connection.watched = connection.interest(false);
        if watch(&self.epoll, ControlOperation::Add, connection.fd(), connection.watched, id).is_ok() {
            self.connections.push(connection);
        }
    }

    /// Is one more connection within the limits? Else the oldest of those that have been refused gives way, so that
    /// the next one can be.
    fn makes_room(&mut self) -> bool {
        let refused = self.connections.iter().filter(|connection| connection.refused).count();
        if self.connections.len() - refused < self.limits.connections {
            return true;
        }
        let idlers = self.connections.iter().enumerate().filter(|(_, connection)| !connection.refused);
        let stalled = idlers.filter_map(|(index, connection)| Some((connection.stalled()?, index))).max();
        if let Some((_, index)) = stalled.filter(|(since, _)| *since >= self.limits.patience) {
            self.connections.swap_remove(index);
            return true;
        }
        if refused >= REFUSED {
            let told = self.connections.iter().enumerate().filter(|(_, connection)| connection.refused);
            if let Some((index, _)) = told.min_by_key(|(_, connection)| connection.id) {
                self.connections.swap_remove(index);
            }
        }
        false
    }

    fn accept_again(&mut self, accepts: bool) {
        let events = if accepts { EventSet::IN } else { EventSet::empty() };
        if watch(&self.epoll, ControlOperation::Modify, self.clients.as_fd().as_raw_fd(), events, LISTENER).is_ok() {
            self.accepts = accepts;
        }
    }
}

/// Looks for the connection's next request, and has it answered.
fn ask<S: Service>(
    connection: &mut Connection,
    find: impl FnOnce(&mut Connection) -> Result<Found, Gone>,
    service: &mut S,
    post: &Arc<Post>,
) -> Result<(), Gone> {
    if !connection.reads() {
        return Ok(());
    }
    match find(connection)? {
        Found::Request(request) => {
            let version = request.version;
            service.call(request, Reply::new(Arc::clone(post), connection.id, version));
        }
        Found::Malformed(malformed) => connection.answer(&service.malformed(400, &malformed.to_string()))?,
        Found::Nothing => {}
    }
    Ok(())
}

fn watch(epoll: &Epoll, operation: ControlOperation, fd: RawFd, events: EventSet, id: u64) -> io::Result<()> {
    epoll.ctl(operation, fd, EpollEvent::new(events, id))
}
