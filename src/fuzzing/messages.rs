//! What comes over the API's socket, from either end.

use std::io::{self, Read, Write};

use super::input::Input;
use crate::api::client::Client;
use crate::api::http::{MAX_LINE, Malformed, Parsed, Parser};

/// Bytes of a body, and so of what is held at most.
const LIMIT: usize = 4096;

/// Parses requests that come in pieces, and the same bytes as answers: the input is the length of the pieces, and then
/// the bytes.
pub fn http(input: &[u8]) {
    let mut input = Input(input);
    let Some(piece) = input.u8() else { return };
    let bytes = input.0;
    assert_eq!(requests(bytes, bytes.len()), requests(bytes, usize::from(piece)), "pieces make a difference");
    if let Err(error) = Client::over(Answering(bytes)).request("GET", "/", None) {
        assert!(!error.to_string().is_empty());
    }
    if let Ok(mut stream) = Client::over(Answering(bytes)).stream("GET", "/", None) {
        while let Ok(Some(_)) = stream.next_line() {}
    }
}

pub fn requests(bytes: &[u8], piece: usize) -> Vec<Result<Parsed, Malformed>> {
    let mut parser = Parser::new(LIMIT);
    let mut found = Vec::new();
    for mut piece in bytes.chunks(piece.max(1)) {
        while let Some(parsed) = parser.feed(&mut piece).transpose() {
            let failed = parsed.is_err();
            found.push(parsed);
            if failed {
                return found;
            }
        }
        assert!(piece.is_empty() && parser.held() <= 2 * (LIMIT + MAX_LINE + 2));
    }
    found
}

/// A server that says this whatever it is asked.
struct Answering<'a>(&'a [u8]);

impl Read for Answering<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Answering<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
