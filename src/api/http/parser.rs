//! Requests out of bytes, which come in pieces of any size and from anybody.
//!
//! The parser keeps a line at most, and the body up to its limit: headers that mean nothing to us are dropped as they
//! come. What it makes of bytes does not depend on how they were cut into pieces.

use std::borrow::Cow;
use std::mem;

use thiserror::Error;

use super::request::{Method, Request, Version};

/// Bytes in a line of a request's head, without its end.
pub const MAX_LINE: usize = 1024;

/// Lines after the request line, trailers among them.
const MAX_HEADERS: u32 = 128;

/// Why bytes are no request that could be served. What follows them cannot be made sense of.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("A line of the request's head has more than {MAX_LINE} bytes.")]
    LongLine,
    #[error("The request has more than {MAX_HEADERS} headers.")]
    ManyHeaders,
    #[error("Not a request line: a method, a path and a version are expected, with one space between.")]
    RequestLine,
    #[error("The path does not begin with a slash, or has characters that have to be encoded.")]
    Path,
    #[error("Neither HTTP/1.1 nor HTTP/1.0.")]
    Version,
    #[error("Not a header: a name, a colon and a value are expected.")]
    Header,
    #[error("The Content-Length is no number, or there is more than one.")]
    Length,
    #[error("The Transfer-Encoding is not `chunked`, or comes with a Content-Length or with HTTP/1.0.")]
    Encoding,
    #[error("Nothing but `100-continue` can be expected.")]
    Expectation,
    #[error("Not a chunk: its size is no hexadecimal number, or its end is missing.")]
    Chunk,
    #[error("The body of the request has more than {0} bytes, which are the limit.")]
    LongBody(usize),
}

/// What has been read whole.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A head, whose client waits for `100 Continue` before it sends the body.
    Continue,
    /// A request; the client may have asked to close the connection after the answer.
    Request { request: Request, close: bool },
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    RequestLine,
    Header,
    /// So many bytes of a body of known length.
    Body(usize),
    ChunkSize,
    Chunk(usize),
    ChunkEnd,
    Trailer,
}

#[derive(Debug)]
pub struct Parser {
    max_body: usize,
    expected: Expected,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
    head: Option<Head>,
    body: Vec<u8>,
    headers: u32,
}

/// What a request's head has said so far.
#[derive(Debug)]
struct Head {
    method: Method,
    path: String,
    version: Version,
    accept: Option<String>,
    length: Option<usize>,
    chunked: bool,
    expects_continue: bool,
    close: bool,
}

impl Parser {
    /// One that allows bodies of up to so many bytes.
    #[must_use]
    pub fn new(max_body: usize) -> Self {
        Self { max_body, expected: Expected::RequestLine, line: Vec::new(), head: None, body: Vec::new(), headers: 0 }
    }

    /// Is it between two requests?
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.expected == Expected::RequestLine && self.line.is_empty()
    }

    /// Bytes of memory that hold what is unfinished.
    #[must_use]
    pub fn held(&self) -> usize {
        self.line.capacity() + self.body.capacity()
    }

    /// Takes bytes off the front of `input`, up to and with the end of what is returned; all of them, and then `None`,
    /// if nothing has become whole. To be asked again until then.
    ///
    /// # Errors
    /// After one, the parser is of no more use.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Parsed>, Malformed> {
        loop {
            if let Expected::Body(left) | Expected::Chunk(left) = self.expected {
                let (bytes, rest) = input.split_at(left.min(input.len()));
                self.body.extend_from_slice(bytes);
                *input = rest;
                let left = left - bytes.len();
                let body = matches!(self.expected, Expected::Body(_));
                self.expected = match (body, left) {
                    (true, 0) => return Ok(self.finish()),
                    (true, left) => Expected::Body(left),
                    (false, 0) => Expected::ChunkEnd,
                    (false, left) => Expected::Chunk(left),
                };
                if left > 0 {
                    return Ok(None);
                }
            } else {
                let Some(line) = next_line(&mut self.line, input)? else { return Ok(None) };
                if let Some(parsed) = self.line(&line)? {
                    return Ok(Some(parsed));
                }
            }
        }
    }

    fn line(&mut self, line: &[u8]) -> Result<Option<Parsed>, Malformed> {
        match self.expected {
            Expected::RequestLine => {
                // Some clients end a body with a line's end too many.
                if !line.is_empty() {
                    self.head = Some(Head::new(line)?);
                    self.expected = Expected::Header;
                }
            }
            Expected::Header if line.is_empty() => return self.end_of_head(),
            Expected::Header => {
                self.count_header()?;
                let max_body = self.max_body;
                if let Some(head) = &mut self.head {
                    head.header(line, max_body)?;
                }
            }
            Expected::ChunkSize => {
                let size = chunk_size(line)?;
                self.expected = match size {
                    0 => Expected::Trailer,
                    size => Expected::Chunk(self.room_for(size)?),
                };
            }
            Expected::ChunkEnd if line.is_empty() => self.expected = Expected::ChunkSize,
            Expected::ChunkEnd => return Err(Malformed::Chunk),
            Expected::Trailer if line.is_empty() => return Ok(self.finish()),
            Expected::Trailer => {
                self.count_header()?;
                split_header(line)?;
            }
            // They are no lines.
            Expected::Body(_) | Expected::Chunk(_) => {}
        }
        Ok(None)
    }

    fn end_of_head(&mut self) -> Result<Option<Parsed>, Malformed> {
        let Some(head) = &self.head else { return Ok(None) };
        if head.chunked && (head.length.is_some() || head.version == Version::Http10) {
            return Err(Malformed::Encoding);
        }
        self.expected = match head.length {
            _ if head.chunked => Expected::ChunkSize,
            None | Some(0) => return Ok(self.finish()),
            Some(length) => Expected::Body(length),
        };
        let waits = head.expects_continue && head.version == Version::Http11;
        Ok(waits.then_some(Parsed::Continue))
    }

    fn finish(&mut self) -> Option<Parsed> {
        self.expected = Expected::RequestLine;
        self.headers = 0;
        let Head { method, path, version, accept, close, .. } = self.head.take()?;
        let request = Request { method, path, version, accept, body: mem::take(&mut self.body) };
        Some(Parsed::Request { request, close })
    }

    fn count_header(&mut self) -> Result<(), Malformed> {
        self.headers += 1;
        if self.headers > MAX_HEADERS { Err(Malformed::ManyHeaders) } else { Ok(()) }
    }

    /// The size of a chunk, if the body may grow by it.
    fn room_for(&self, size: u64) -> Result<usize, Malformed> {
        usize::try_from(size)
            .ok()
            .filter(|size| *size <= self.max_body - self.body.len())
            .ok_or(Malformed::LongBody(self.max_body))
    }
}

impl Head {
    fn new(line: &[u8]) -> Result<Self, Malformed> {
        let mut words = line.split(|byte| *byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(Malformed::RequestLine);
        };
        let method = token(method).ok_or(Malformed::RequestLine)?;
        let version = match version {
            b"HTTP/1.1" => Version::Http11,
            b"HTTP/1.0" => Version::Http10,
            _ => return Err(Malformed::Version),
        };
        Ok(Self {
            method: Method::from_token(method),
            path: path(target).ok_or(Malformed::Path)?,
            version,
            accept: None,
            length: None,
            chunked: false,
            expects_continue: false,
            close: false,
        })
    }

    /// Takes in a header, if it means something to us.
    fn header(&mut self, line: &[u8], max_body: usize) -> Result<(), Malformed> {
        let (name, value) = split_header(line)?;
        let named = |known: &str| name.eq_ignore_ascii_case(known);
        if named("content-length") {
            if self.length.is_some() {
                return Err(Malformed::Length);
            }
            self.length = Some(length(value, max_body)?);
        } else if named("transfer-encoding") {
            if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed::Encoding);
            }
            self.chunked = true;
        } else if named("expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(Malformed::Expectation);
            }
            self.expects_continue = true;
        } else if named("connection") {
            let mut options = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            self.close |= options.any(|option| option.eq_ignore_ascii_case(b"close"));
        } else if named("accept") {
            self.accept = self.accept.take().or_else(|| Some(String::from_utf8_lossy(value).into_owned()));
        }
        Ok(())
    }
}

/// The next line, without its end: CR and LF, or LF alone (RFC 9112, 2.2). What of it has come is held if that is not
/// all of it.
fn next_line<'a>(held: &mut Vec<u8>, input: &mut &'a [u8]) -> Result<Option<Cow<'a, [u8]>>, Malformed> {
    let end = input.iter().position(|byte| *byte == b'\n');
    let piece = &input[..end.unwrap_or(input.len())];
    // The end's CR may be there already.
    if held.len() + piece.len() > MAX_LINE + 1 {
        return Err(Malformed::LongLine);
    }
    let Some(end) = end else {
        held.extend_from_slice(piece);
        *input = &[];
        return Ok(None);
    };
    *input = &input[end + 1..];
    let mut line = Cow::Borrowed(piece);
    if !held.is_empty() {
        held.extend_from_slice(piece);
        line = Cow::Owned(mem::take(held));
    }
    if line.last() == Some(&b'\r') {
        line = match line {
            Cow::Borrowed(line) => Cow::Borrowed(&line[..line.len() - 1]),
            Cow::Owned(mut line) => {
                line.pop();
                Cow::Owned(line)
            }
        };
    }
    if line.len() > MAX_LINE { Err(Malformed::LongLine) } else { Ok(Some(line)) }
}

/// A token (RFC 9110, 5.6.2).
fn token(bytes: &[u8]) -> Option<&str> {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    str::from_utf8(bytes).ok().filter(|text| !text.is_empty() && bytes.iter().all(allowed))
}

/// The path and query of a request's target, which may name a host before them.
fn path(target: &[u8]) -> Option<String> {
    const SCHEME: &str = "http://";
    let target = str::from_utf8(target).ok().filter(|target| target.bytes().all(|byte| byte.is_ascii_graphic()))?;
    if target.starts_with('/') {
        return Some(target.to_owned());
    }
    let (scheme, rest) = target.split_at_checked(SCHEME.len())?;
    if !scheme.eq_ignore_ascii_case(SCHEME) {
        return None;
    }
    let path = rest.find(['/', '?']).map_or("", |start| &rest[start..]);
    Some(if path.starts_with('/') { path.to_owned() } else { format!("/{path}") })
}

fn split_header(line: &[u8]) -> Result<(&str, &[u8]), Malformed> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or(Malformed::Header)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let name = token(name).ok_or(Malformed::Header)?;
    if value.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err(Malformed::Header);
    }
    Ok((name, value.trim_ascii()))
}

fn length(value: &[u8], max_body: usize) -> Result<usize, Malformed> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Malformed::Length);
    }
    let number = str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
    // A number that cannot be held is certainly too large.
    number.filter(|length| *length <= max_body).ok_or(Malformed::LongBody(max_body))
}

/// What a chunk's first line says; extensions mean nothing to us.
fn chunk_size(line: &[u8]) -> Result<u64, Malformed> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii_end();
    if digits.is_empty() || digits.len() > 16 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(Malformed::Chunk);
    }
    str::from_utf8(digits).ok().and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or(Malformed::Chunk)
}
