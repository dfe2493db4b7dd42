//! A client that waits for its answers: what the command line talks to a VM with.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Bytes of an answer, or of a line of a stream.
const MAX_BODY: usize = 16 << 20;

/// Bytes in a line of an answer's head, and how many lines.
const MAX_LINE: u64 = 8 << 10;
const MAX_HEADERS: usize = 128;
/// Answers that come before one (RFC 9110, section 15.2).
const MAX_INTERIM: usize = 16;

#[derive(Debug, Error)]
pub enum ClientError {
    #[error("cannot connect to {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("the connection fails")]
    Connection(#[from] io::Error),
    #[error("the server has closed the connection before its answer was whole")]
    Closed,
    #[error("what answers does not speak HTTP: {0}")]
    NotHttp(&'static str),
    #[error("the answer has more than {} MiB", MAX_BODY >> 20)]
    TooLong,
    #[error("{0:?} is no method or path that can be asked for")]
    NotAskable(String),
}

impl ClientError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Connect { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Some("is a VM running with that --api-sock?"),
                io::ErrorKind::ConnectionRefused => Some("nobody listens: the socket was left by a VM that has ended"),
                _ => None,
            },
            Self::NotAskable(_) => Some("a path begins with a slash; spaces and other than ASCII have to be encoded"),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub content_type: Option<String>,
    pub body: Vec<u8>,
}

/// A connection to a server.
pub struct Client<S = UnixStream> {
    stream: BufReader<S>,
}

impl Client {
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect { path: path.into(), source })?;
        Ok(Self::over(stream))
    }
}

impl<S: Read + Write> Client<S> {
    pub fn over(stream: S) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    /// Asks, and waits for the whole answer, whatever its status.
    ///
    /// # Errors
    /// After one, the connection is of no more use.
    pub fn request(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> Result<Answer, ClientError> {
        let mut head = self.ask(method, path, body)?;
        let mut body = Vec::new();
        while head.framing.next_piece(&mut self.stream, &mut body)? {
            if body.len() > MAX_BODY {
                return Err(ClientError::TooLong);
            }
        }
        Ok(Answer { status: head.status, content_type: head.content_type, body })
    }

    /// Asks for what may come bit by bit and never end.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn stream(mut self, method: &str, path: &str, body: Option<&[u8]>) -> Result<AnswerStream<S>, ClientError> {
        let Head { status, content_type, framing } = self.ask(method, path, body)?;
        Ok(AnswerStream { status, content_type, framing, stream: self.stream, read: Vec::new() })
    }

    fn ask(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> Result<Head, ClientError> {
        let askable = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if let Some(text) = [method, path].into_iter().find(|text| !askable(text)) {
            return Err(ClientError::NotAskable(text.to_owned()));
        }
        if !path.starts_with('/') {
            return Err(ClientError::NotAskable(path.to_owned()));
        }
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n").into_bytes();
        if let Some(body) = body {
            let headers = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
            request.extend_from_slice(headers.as_bytes());
        }
        request.extend_from_slice(b"\r\n");
        request.extend_from_slice(body.unwrap_or_default());
        match self.stream.get_mut().write_all(&request) {
            // The answer may say why nobody wanted to read on.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written?,
        }
        for _ in 0..MAX_INTERIM {
            let head = Head::read(&mut self.stream)?;
            // Those below are not the answer yet.
            if head.status >= 200 {
                return Ok(head);
            }
        }
        Err(ClientError::NotHttp("too many answers that are none yet"))
    }
}

/// An answer whose body is read bit by bit.
pub struct AnswerStream<S = UnixStream> {
    pub status: u16,
    pub content_type: Option<String>,
    framing: Framing,
    stream: BufReader<S>,
    /// Of lines that have not been asked for yet.
    read: Vec<u8>,
}

impl<S: Read> AnswerStream<S> {
    /// Waits for more of the body, as much as comes at once; `None` at its end.
    ///
    /// # Errors
    /// After one, no more is to be had.
    pub fn next_bytes(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        if !self.read.is_empty() || self.framing.next_piece(&mut self.stream, &mut self.read)? {
            return Ok(Some(mem::take(&mut self.read)));
        }
        Ok(None)
    }

    /// Waits for the next line of the body, and returns it without its end; `None` at the body's end.
    ///
    /// # Errors
    /// After one, no more is to be had.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.read[searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.read.split_off(searched + end + 1);
                let mut line = mem::replace(&mut self.read, rest);
                line.pop();
                return Ok(Some(line));
            }
            searched = self.read.len();
            if searched > MAX_BODY {
                return Err(ClientError::TooLong);
            }
            if !self.framing.next_piece(&mut self.stream, &mut self.read)? {
                let rest = mem::take(&mut self.read);
                return Ok(Some(rest).filter(|rest| !rest.is_empty()));
            }
        }
    }
}

#[derive(Debug)]
struct Head {
    status: u16,
    content_type: Option<String>,
    framing: Framing,
}

impl Head {
    fn read(from: &mut impl BufRead) -> Result<Self, ClientError> {
        let line = read_line(from)?;
        let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)).and_then(status);
        let status = status.ok_or(ClientError::NotHttp("it begins with no status"))?;
        let (mut content_type, mut length, mut chunked) = (None, None, false);
        for count in 0.. {
            let line = read_line(from)?;
            if line.is_empty() {
                break;
            }
            if count == MAX_HEADERS {
                return Err(ClientError::NotHttp("too many headers"));
            }
            let (name, value) = line.split_once(':').ok_or(ClientError::NotHttp("a header without a colon"))?;
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-type" => content_type = Some(value.to_owned()),
                "content-length" => {
                    length =
                        Some(value.parse().map_err(|_| ClientError::NotHttp("a Content-Length that is no number"))?);
                }
                "transfer-encoding" => chunked = value.eq_ignore_ascii_case("chunked"),
                _ => {}
            }
        }
        let framing = match (status, length) {
            (100..200 | 204 | 304, _) => Framing::Ended,
            _ if chunked => Framing::ChunkSize,
            (_, Some(length)) => Framing::Length(length),
            (_, None) => Framing::UntilClose,
        };
        Ok(Self { status, content_type, framing })
    }
}

fn status(digits: &str) -> Option<u16> {
    digits.parse().ok().filter(|status| (100..1000).contains(status))
}

/// How much of a body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    ChunkSize,
    Chunk(u64),
    UntilClose,
    Ended,
}

impl Framing {
    /// Appends what comes at once of the body, at least a byte; `false` at its end.
    fn next_piece(&mut self, from: &mut impl BufRead, to: &mut Vec<u8>) -> Result<bool, ClientError> {
        if *self == Self::ChunkSize {
            let line = read_line(from)?;
            let digits = line.split(';').next().unwrap_or_default().trim();
            *self = match u64::from_str_radix(digits, 16) {
                Ok(0) => Self::Length(0),
                Ok(size) => Self::Chunk(size),
                Err(_) => return Err(ClientError::NotHttp("a chunk without a size")),
            };
            if *self == Self::Length(0) {
                skip_trailers(from)?;
            }
        }
        let left = match *self {
            Self::Length(0) | Self::Ended => {
                *self = Self::Ended;
                return Ok(false);
            }
            Self::Length(left) | Self::Chunk(left) => left,
            Self::UntilClose | Self::ChunkSize => u64::MAX,
        };
        let piece = loop {
            match from.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                piece => break piece?,
            }
        };
        if piece.is_empty() {
            if *self != Self::UntilClose {
                return Err(ClientError::Closed);
            }
            *self = Self::Ended;
            return Ok(false);
        }
        let count = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        to.extend_from_slice(&piece[..count]);
        from.consume(count);
        let left = left - count as u64;
        match self {
            Self::Length(length) => *length = left,
            Self::Chunk(_) if left == 0 => {
                if !read_line(from)?.is_empty() {
                    return Err(ClientError::NotHttp("a chunk without an end"));
                }
                *self = Self::ChunkSize;
            }
            Self::Chunk(size) => *size = left,
            Self::UntilClose | Self::ChunkSize | Self::Ended => {}
        }
        Ok(true)
    }
}

/// Headers that may come after the last chunk.
fn skip_trailers(from: &mut impl BufRead) -> Result<(), ClientError> {
    for _ in 0..=MAX_HEADERS {
        if read_line(from)?.is_empty() {
            return Ok(());
        }
    }
    Err(ClientError::NotHttp("too many headers"))
}

/// A line of an answer's head, without its end.
fn read_line(from: &mut impl BufRead) -> Result<String, ClientError> {
    let mut line = Vec::new();
    from.take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(if line.len() as u64 + 1 >= MAX_LINE {
            ClientError::NotHttp("too long a line")
        } else {
            ClientError::Closed
        });
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    String::from_utf8(line).map_err(|_| ClientError::NotHttp("a header that is no text"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use proptest::prelude::*;

    use super::*;

    /// Answers whatever is asked with bytes that are there already.
    struct Canned<'a>(&'a [u8]);

    impl Read for Canned<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Canned<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn answer(bytes: &[u8]) -> Result<Answer, ClientError> {
        Client::over(Canned(bytes)).request("GET", "/", None)
    }

    fn body(bytes: &[u8]) -> String {
        String::from_utf8(answer(bytes).unwrap().body).unwrap()
    }

    #[test]
    fn a_body_ends_where_its_head_says() {
        assert_eq!(body(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc"), "ab");
        assert_eq!(body(b"HTTP/1.1 204 \r\n\r\nabc"), "");
        assert_eq!(body(b"HTTP/1.1 200 OK\r\n\r\nabc"), "abc");
        assert_eq!(body(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\ncontent-LENGTH:1\n\nabc"), "a");
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\nA\r\n0123456789\r\n0\r\nT: x\r\n\r\n";
        assert_eq!(body(chunked), "ab0123456789");
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for bytes in [
            &b"SSH-2.0\r\n\r\n"[..],
            b"HTTP/1.1 20\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
            &[b'x'; 1 << 20],
        ] {
            assert!(matches!(answer(bytes), Err(ClientError::NotHttp(_))), "{}", String::from_utf8_lossy(bytes));
        }
        for bytes in [&b""[..], b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na"] {
            assert!(matches!(answer(bytes), Err(ClientError::Closed)), "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn an_endless_answer_is_given_up() {
        struct Endless(usize);
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";
                let count = buffer.len();
                buffer.fill(b'x');
                for byte in &mut *buffer {
                    *byte = HEAD.get(self.0).copied().unwrap_or(b'x');
                    self.0 += 1;
                }
                Ok(count)
            }
        }
        impl Write for Endless {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(matches!(Client::over(Endless(0)).request("GET", "/", None), Err(ClientError::TooLong)));
        let mut stream = Client::over(Endless(0)).stream("GET", "/", None).unwrap();
        assert!(matches!(stream.next_line(), Err(ClientError::TooLong)));
    }

    #[test]
    fn lines_come_out_of_pieces() {
        let bytes =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n3\r\nb\nc\r\n2\r\n\nd\r\n0\r\n\r\n";
        let mut stream = Client::over(Canned(bytes)).stream("GET", "/", None).unwrap();
        let lines: Vec<_> = std::iter::from_fn(|| stream.next_line().unwrap()).collect();
        assert_eq!(lines, [b"a", b"b", b"c", b"d"]);
    }

    #[test]
    fn what_cannot_be_asked_is_not_sent() {
        for (method, path) in [("GET", "/a b"), ("GET", "vm"), ("GET", "/\r\n"), ("GET", ""), ("", "/"), ("GET", "/ä")]
        {
            let asked = Client::over(Canned(b"")).request(method, path, None);
            assert!(matches!(asked, Err(ClientError::NotAskable(_))), "{method} {path}");
        }
    }

    #[test]
    fn an_error_says_where_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let error = Client::connect(&path).err().unwrap();
        assert!(error.to_string().contains("/socket") && error.hint().unwrap().contains("running"), "{error}");
        drop(UnixListener::bind(&path).unwrap());
        assert!(Client::connect(&path).err().unwrap().hint().unwrap().contains("ended"));
    }

    proptest! {
        #[test]
        fn any_answer_is_an_answer_or_an_error(bytes: Vec<u8>, ending in "(HTTP/1\\.1 200 \r\n)?(Transfer-Encoding: chunked\r\n)?\r\n[0-9a-f\r\n]{0,64}") {
            let _ = answer(&bytes);
            let _ = answer(&[ending.as_bytes(), &bytes].concat());
        }
    }
}
