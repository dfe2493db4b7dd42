//! What a client is answered.

/// The name that clients of Firecracker look for.
const SERVER: &str = "Firecracker API";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// Of the body.
    pub content_type: &'static str,
    pub body: Option<Vec<u8>>,
    /// Was anything used that will go away?
    pub deprecated: bool,
    /// Headers besides, as `("Allow", "GET")`.
    pub headers: Vec<(&'static str, String)>,
}

/// How an answer's end is told, and what comes after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// The body is known.
    Length,
    /// As [`Self::Length`], but the body is left out: the answer to HEAD.
    HeadOnly,
    /// The body follows in chunks.
    Chunked,
    /// The body follows and ends with the connection.
    UntilClose,
}

impl Response {
    /// Success without data.
    #[must_use]
    pub fn no_content() -> Self {
        Self { status: 204, content_type: "", body: None, deprecated: false, headers: Vec::new() }
    }

    #[must_use]
    pub fn json(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self::new(status, "application/json", body)
    }

    #[must_use]
    pub fn new(status: u16, content_type: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, content_type, body: Some(body.into()), deprecated: false, headers: Vec::new() }
    }

    #[must_use]
    pub fn deprecated(mut self, deprecated: bool) -> Self {
        self.deprecated = deprecated;
        self
    }

    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Appends the answer as it goes over the wire; `close` says that the connection ends with it.
    pub fn render(&self, framing: Framing, close: bool, out: &mut Vec<u8>) {
        let body = self.body.as_deref().filter(|_| self.status != 204);
        out.reserve(256 + body.map_or(0, <[u8]>::len));
        out.extend_from_slice(format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status)).as_bytes());
        header(out, "Server", SERVER);
        header(out, "Connection", if close { "close" } else { "keep-alive" });
        if self.deprecated {
            header(out, "Deprecation", "true");
        }
        for (name, value) in &self.headers {
            // A line's end within a value would begin another header.
            header(out, name, &value.replace(|c: char| c.is_control(), " "));
        }
        if body.is_some() {
            header(out, "Content-Type", self.content_type);
        }
        match framing {
            Framing::Chunked => header(out, "Transfer-Encoding", "chunked"),
            Framing::Length | Framing::HeadOnly if self.status != 204 => {
                header(out, "Content-Length", &body.map_or(0, <[u8]>::len).to_string());
            }
            Framing::Length | Framing::HeadOnly | Framing::UntilClose => {}
        }
        out.extend_from_slice(b"\r\n");
        if framing == Framing::Length {
            out.extend_from_slice(body.unwrap_or_default());
        }
    }
}

fn header(out: &mut Vec<u8>, name: &str, value: &str) {
    for part in [name, ": ", value, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// What people call a status.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        408 => "Request Timeout",
        409 => "Conflict",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        507 => "Insufficient Storage",
        // It may be empty.
        _ => "",
    }
}
