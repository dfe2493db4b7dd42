//! Ethernet frames over a stream socket, each behind its length (32 bits, big-endian): the protocol of passt and of
//! QEMU's `-netdev stream`.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;

use crate::memory::IoBuf;

/// The longest frame: passt takes no longer ones, nor sends them.
pub const MAX_FRAME: usize = 65_535;

const PREFIX: usize = size_of::<u32>();

/// Room for a frame of any length, and for many short ones by one system call.
const INBOX: usize = 128 << 10;

/// Why there will be no more frames.
#[derive(Debug, Error)]
pub enum FrameError {
    #[error("the other side has hung up")]
    Closed,
    #[error("a frame of {0} bytes is announced, longer than any can be")]
    Length(u32),
    #[error("the socket fails: {0}")]
    Socket(#[source] io::Error),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Socket(error),
        }
    }
}

/// Our end. It never waits.
pub struct FrameStream {
    socket: UnixStream,
    /// The same socket again: a set of descriptors to be watched takes each one once.
    writing: UnixStream,
    inbox: Box<[u8]>,
    /// What of the inbox has been read from the socket and not been consumed.
    start: usize,
    end: usize,
    /// The rest of a frame that the socket did not take whole. No other may follow before it.
    outbox: Vec<u8>,
    sent: usize,
}

impl FrameStream {
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let writing = socket.try_clone()?;
        let inbox = vec![0; INBOX].into_boxed_slice();
        Ok(Self { socket, writing, inbox, start: 0, end: 0, outbox: Vec::new(), sent: 0 })
    }

    /// Readable when [`Self::peek`] may find more.
    pub fn reading(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Writable when [`Self::flush`] may get on.
    pub fn writing(&self) -> BorrowedFd<'_> {
        self.writing.as_fd()
    }

    /// The next frame, if it is there as a whole. It stays the next one until it is consumed.
    pub fn peek(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let len = loop {
            let len = self.announced()?;
            if let Some(len) = len.filter(|len| self.end - self.start >= PREFIX + len) {
                break len;
            }
            self.inbox.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            match self.socket.read(&mut self.inbox[self.end..]) {
                Ok(0) => return Err(FrameError::Closed),
                Ok(n) => self.end += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        };
        Ok(Some(&self.inbox[self.start + PREFIX..][..len]))
    }

    /// Goes on behind the frame that [`Self::peek`] has shown.
    pub fn consume(&mut self) {
        if let Ok(Some(len)) = self.announced() {
            self.start = self.end.min(self.start + PREFIX + len);
        }
    }

    /// The length of the next frame, if so much is there.
    fn announced(&self) -> Result<Option<usize>, FrameError> {
        let Some(prefix) = self.inbox[self.start..self.end].first_chunk() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix);
        if len as usize > MAX_FRAME { Err(FrameError::Length(len)) } else { Ok(Some(len as usize)) }
    }

    /// Gets on with the frame that was sent last; `true` if the next one may be sent.
    pub fn flush(&mut self) -> Result<bool, FrameError> {
        while self.sent < self.outbox.len() {
            match self.socket.write(&self.outbox[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        self.outbox.clear();
        self.sent = 0;
        Ok(true)
    }

    /// Sends a frame of at most [`MAX_FRAME`] bytes, after [`Self::flush`] has said `true`. What the socket does not
    /// take now is kept for the next flush.
    pub fn send(&mut self, frame: &mut IoBuf) -> Result<(), FrameError> {
        let prefix = (frame.len() as u32).to_be_bytes();
        let sent = match frame.write_behind(&prefix, self.socket.as_fd()) {
            Ok(n) if n == PREFIX + frame.len() => return Ok(()),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error.into()),
        };
        self.outbox.extend_from_slice(&prefix);
        self.outbox.resize(PREFIX + frame.len(), 0);
        frame.copy_to(&mut self.outbox[PREFIX..]);
        self.sent = sent;
        Ok(())
    }

    /// The same for bytes of our own.
    pub fn send_bytes(&mut self, frame: &[u8]) -> Result<bool, FrameError> {
        self.outbox.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        self.outbox.extend_from_slice(frame);
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair() -> (FrameStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (FrameStream::new(ours).unwrap(), theirs)
    }

    #[test]
    fn the_end_of_a_stream_is_told_after_its_frames() {
        let (mut frames, mut theirs) = pair();
        theirs.write_all(&[0, 0, 0, 2, 7, 8, 0, 0, 0, 3, 1]).unwrap();
        drop(theirs);
        assert_eq!(frames.peek().unwrap(), Some(&[7, 8][..]));
        frames.consume();
        assert!(matches!(frames.peek(), Err(FrameError::Closed)));
        let (mut frames, theirs) = pair();
        drop(theirs);
        assert!(matches!(frames.send_bytes(&[1; 20]), Err(FrameError::Closed)));
    }

    proptest! {
        #[test]
        fn frames_arrive_however_they_are_cut(
            sizes in proptest::collection::vec(0usize..3000, 0..60),
            cuts in proptest::collection::vec(1usize..5000, 1..40),
        ) {
            let (mut frames, mut theirs) = pair();
            let all: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, &len)| vec![i as u8; len]).collect();
            let stream: Vec<u8> = all.iter().flat_map(|f| [&(f.len() as u32).to_be_bytes()[..], f].concat()).collect();
            let (mut rest, mut cuts, mut got) = (&stream[..], cuts.iter().cycle(), Vec::new());
            loop {
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                theirs.write_all(now).unwrap();
                rest = later;
                while let Some(frame) = frames.peek().unwrap() {
                    got.push(frame.to_vec());
                    frames.consume();
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(got, all);
        }

        #[test]
        fn any_bytes_are_read_to_their_end(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (mut frames, mut theirs) = pair();
            theirs.write_all(&bytes).unwrap();
            drop(theirs);
            let mut read = 0;
            let error = loop {
                match frames.peek() {
                    Ok(frame) => read += PREFIX + frame.expect("there is more, or an end").len(),
                    Err(error) => break error,
                }
                frames.consume();
            };
            prop_assert!(read <= bytes.len());
            if let FrameError::Length(len) = error {
                prop_assert!(len as usize > MAX_FRAME && bytes[read..read + PREFIX] == len.to_be_bytes());
            }
        }
    }
}
