//! How answers come to the server's thread: from itself or any other, at once or later.

use std::io::Write;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::http::{Response, Version};

/// Bytes of a stream that wait for a slow client, before they go to its socket.
pub const STREAM_BUFFER: usize = 64 << 10;

/// What is answered to a request. Dropped, it answers 500.
#[must_use = "a request is to be answered"]
pub struct Reply {
    /// Nowhere, once it has been given.
    post: Option<Arc<Post>>,
    connection: u64,
    version: Version,
}

impl Reply {
    pub(super) fn new(post: Arc<Post>, connection: u64, version: Version) -> Self {
        Self { post: Some(post), connection, version }
    }

    pub fn send(mut self, response: Response) {
        self.post(Mail::Answer(response));
    }

    /// Answers with a stream: status 200, and a body whose chunks follow.
    #[must_use = "the stream ends when its sender is dropped"]
    pub fn stream(mut self, content_type: &'static str) -> StreamSender {
        let stream = Arc::new(Stream {
            content_type,
            chunked: self.version == Version::Http11,
            state: Mutex::new(StreamState::default()),
        });
        let post = self.post.clone();
        self.post(Mail::Stream(Arc::clone(&stream)));
        StreamSender { post, connection: self.connection, stream }
    }

    fn post(&mut self, mail: Mail) {
        if let Some(post) = self.post.take() {
            post.send(self.connection, mail);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.post(Mail::Unanswered);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StreamError {
    #[error("the client is gone")]
    Closed,
    #[error("the client reads too slowly")]
    TooSlow,
}

/// The service's end of a stream. Dropped, it ends the stream, and the connection serves its next request.
pub struct StreamSender {
    post: Option<Arc<Post>>,
    connection: u64,
    stream: Arc<Stream>,
}

impl StreamSender {
    /// Sends what is one chunk of the body. Never waits: a client that has left [`STREAM_BUFFER`] bytes unread is
    /// disconnected.
    ///
    /// # Errors
    /// After one, there is nobody to send to.
    pub fn send(&self, bytes: &[u8]) -> Result<(), StreamError> {
        if bytes.is_empty() {
            // It would be the body's end.
            return if self.is_closed() { Err(StreamError::Closed) } else { Ok(()) };
        }
        let mut state = self.stream.lock();
        if state.closed {
            return Err(StreamError::Closed);
        }
        let sent = if bytes.len() > STREAM_BUFFER.saturating_sub(state.bytes.len()) {
            *state = StreamState { closed: true, posted: state.posted, ..StreamState::default() };
            Err(StreamError::TooSlow)
        } else {
            self.stream.append(&mut state, bytes);
            Ok(())
        };
        self.announce(state);
        sent
    }

    /// Has the client left, or been disconnected? Whoever keeps senders throws such ones away when another one comes:
    /// then they are never more than the server has connections, and one.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.stream.lock().closed
    }

    /// Tells the server, once until it has looked.
    fn announce(&self, mut state: MutexGuard<'_, StreamState>) {
        let news = !mem::replace(&mut state.posted, true);
        drop(state);
        if let Some(post) = self.post.as_ref().filter(|_| news) {
            post.send(self.connection, Mail::StreamMoves);
        }
    }
}

impl Drop for StreamSender {
    fn drop(&mut self) {
        let mut state = self.stream.lock();
        if !state.closed {
            state.ended = true;
            self.announce(state);
        }
    }
}

/// A body that is sent bit by bit, shared by the service and the server.
pub struct Stream {
    pub content_type: &'static str,
    /// Else it ends with the connection, as HTTP/1.0 knows no chunks.
    pub chunked: bool,
    state: Mutex<StreamState>,
}

#[derive(Default)]
struct StreamState {
    /// As they go over the wire.
    bytes: Vec<u8>,
    /// There is nobody to send to.
    closed: bool,
    /// There is nobody who sends.
    ended: bool,
    /// The server has been told to look.
    posted: bool,
}

/// How a stream stands after a look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    NotYet,
    /// As it should.
    Proper,
    /// Cut short.
    TooSlow,
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, state: &mut StreamState, bytes: &[u8]) {
        if self.chunked {
            // Writing to a vector does not fail.
            let _ = write!(state.bytes, "{:x}\r\n", bytes.len());
        }
        state.bytes.extend_from_slice(bytes);
        if self.chunked {
            state.bytes.extend_from_slice(b"\r\n");
        }
    }

    /// The service may announce news again.
    pub fn look(&self) {
        self.lock().posted = false;
    }

    /// Moves what was sent to `out`, which is empty.
    pub fn take(&self, out: &mut Vec<u8>) -> StreamEnd {
        let mut state = self.lock();
        if state.closed {
            return StreamEnd::TooSlow;
        }
        mem::swap(out, &mut state.bytes);
        if !state.ended {
            return StreamEnd::NotYet;
        }
        if self.chunked {
            out.extend_from_slice(b"0\r\n\r\n");
        }
        StreamEnd::Proper
    }

    /// The client is gone.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.bytes = Vec::new();
    }
}

pub enum Mail {
    Answer(Response),
    Unanswered,
    Stream(Arc<Stream>),
    /// Look at the stream.
    StreamMoves,
}

/// What is to be done by the server's thread. Bounded, as there is one letter for each request at most, and one for
/// each stream.
pub struct Post {
    bell: EventFd,
    inbox: Mutex<Inbox>,
    /// How often the server has slept.
    #[cfg(test)]
    pub sleeps: std::sync::atomic::AtomicU32,
}

#[derive(Default)]
struct Inbox {
    /// With the number of the connection concerned.
    letters: Vec<(u64, Mail)>,
    /// The bell has to be rung.
    asleep: bool,
    stop: bool,
}

/// What the server's thread does when it has done everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// There is more already.
    Letters,
    Sleep,
    Stop,
}

impl Post {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            inbox: Mutex::default(),
            #[cfg(test)]
            sleeps: std::sync::atomic::AtomicU32::new(0),
        })
    }

    /// Rings (edge-triggered) when the server sleeps and has to do something.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inbox)) {
        let mut inbox = self.lock();
        change(&mut inbox);
        let asleep = mem::take(&mut inbox.asleep);
        drop(inbox);
        if asleep {
            // It fails only when the counter is full, which takes longer than the world will last.
            let _ = self.bell.write(1);
        }
    }

    fn send(&self, connection: u64, mail: Mail) {
        self.change(|inbox| inbox.letters.push((connection, mail)));
    }

    /// Ends the server's thread after the letters that are there.
    pub fn stop(&self) {
        self.change(|inbox| inbox.stop = true);
    }

    /// Moves the letters to `letters`, which is empty. `false` if there are none.
    pub fn take(&self, letters: &mut Vec<(u64, Mail)>) -> bool {
        mem::swap(letters, &mut self.lock().letters);
        !letters.is_empty()
    }

    /// The server is about to sleep: the bell is rung from here on, until [`Self::awake`].
    pub fn next(&self) -> Next {
        let mut inbox = self.lock();
        if !inbox.letters.is_empty() {
            return Next::Letters;
        }
        inbox.asleep = !inbox.stop;
        if inbox.stop { Next::Stop } else { Next::Sleep }
    }

    /// The server looks for letters before it sleeps again: no bell is needed.
    pub fn awake(&self) {
        self.lock().asleep = false;
        #[cfg(test)]
        self.sleeps.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Where a reply without a server went.
#[cfg(test)]
pub struct Replied(Arc<Post>);

#[cfg(test)]
impl Reply {
    /// For tests of a service alone.
    pub fn detached() -> (Self, Replied) {
        let post = Arc::new(Post::new().expect("an eventfd"));
        (Self::new(Arc::clone(&post), 0, Version::Http11), Replied(post))
    }
}

#[cfg(test)]
impl Replied {
    /// The answer, if it has been given; 500 if the reply was dropped, 200 for the head of a stream.
    pub fn take(&self) -> Option<Response> {
        let (_, mail) = self.0.lock().letters.pop()?;
        match mail {
            Mail::Answer(response) => Some(response),
            Mail::Unanswered => Some(Response::new(500, "text/plain", "unanswered")),
            Mail::Stream(stream) => Some(Response::new(200, stream.content_type, "")),
            Mail::StreamMoves => None,
        }
    }
}
