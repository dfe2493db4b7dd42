use proptest::prelude::*;

use super::*;

const LIMIT: usize = 51_200;

/// What a parser makes of bytes that come in these pieces, up to the first error.
fn parse_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, limit: usize) -> Vec<Result<Parsed, Malformed>> {
    let mut parser = Parser::new(limit);
    let mut found = Vec::new();
    for mut piece in pieces {
        while let Some(parsed) = parser.feed(&mut piece).transpose() {
            let failed = parsed.is_err();
            found.push(parsed);
            if failed {
                return found;
            }
        }
        assert!(piece.is_empty(), "something was left though nothing is whole");
        assert!(parser.held() <= 2 * (limit + MAX_LINE + 2), "{} bytes held", parser.held());
    }
    found
}

fn parse(bytes: &[u8]) -> Vec<Result<Parsed, Malformed>> {
    parse_pieces([bytes], LIMIT)
}

fn one(text: &str) -> (Request, bool) {
    match <[_; 1]>::try_from(parse(text.as_bytes())) {
        Ok([Ok(Parsed::Request { request, close })]) => (request, close),
        other => panic!("{text:?}: {other:?}"),
    }
}

#[test]
fn requests_as_clients_send_them() {
    let (request, close) = one("GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n");
    assert_eq!((request.method, request.path.as_str(), request.version), (Method::Get, "/", Version::Http11));
    assert_eq!((request.accept.as_deref(), request.body.len(), close), (Some("*/*"), 0, false));

    let (request, close) = one("PUT /drives/a?b=c HTTP/1.0\r\ncontent-length:  2 \r\nCONNECTION: x, Close\r\n\r\n{}");
    assert_eq!(
        (request.method, request.path.as_str(), request.version),
        (Method::Put, "/drives/a?b=c", Version::Http10)
    );
    assert_eq!((request.body.as_slice(), close), (&b"{}"[..], true));

    let (request, _) = one(
        "PATCH /vm HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3;a=b\r\nabc\r\n00A\r\n0123456789\r\n0\r\nT: x\r\n\r\n",
    );
    assert_eq!((request.method, request.body.as_slice()), (Method::Patch, &b"abc0123456789"[..]));

    // Lines that end with LF alone, and an empty line before the request.
    assert_eq!(one("\r\n\nDELETE /x HTTP/1.1\n\n").0.method, Method::Delete);
    assert_eq!(one("BREW /x HTTP/1.1\r\n\r\n").0.method, Method::Other("BREW".into()));
}

#[test]
fn a_target_with_a_host_is_a_path() {
    for (target, path) in [
        ("http://localhost/vm", "/vm"),
        ("HTTP://a:80/", "/"),
        ("http://a", "/"),
        ("http://a?b", "/?b"),
        ("//a", "//a"),
    ] {
        assert_eq!(one(&format!("GET {target} HTTP/1.1\r\n\r\n")).0.path, path, "{target}");
    }
}

#[test]
fn what_is_no_request() {
    let head = |header: &str| format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n");
    let chunked = |body: &str| format!("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
    let long = |len: usize| "x".repeat(len);
    for (text, expected) in [
        ("GET /\r\n".to_owned(), Malformed::RequestLine),
        ("GET  / HTTP/1.1\r\n".into(), Malformed::RequestLine),
        ("GET / HTTP/1.1 \r\n".into(), Malformed::RequestLine),
        (" GET / HTTP/1.1\r\n".into(), Malformed::RequestLine),
        ("G\u{e4}T / HTTP/1.1\r\n".into(), Malformed::RequestLine),
        ("GET nope HTTP/1.1\r\n".into(), Malformed::Path),
        ("OPTIONS * HTTP/1.1\r\n".into(), Malformed::Path),
        ("GET ftp://a/ HTTP/1.1\r\n".into(), Malformed::Path),
        ("GET /\u{e4} HTTP/1.1\r\n".into(), Malformed::Path),
        ("GET /\x7f HTTP/1.1\r\n".into(), Malformed::Path),
        ("GET / HTTP/2.0\r\n".into(), Malformed::Version),
        ("GET / http/1.1\r\n".into(), Malformed::Version),
        (head("no colon"), Malformed::Header),
        (head(": no name"), Malformed::Header),
        (head("space : x"), Malformed::Header),
        (head(" folded: x"), Malformed::Header),
        (head("a: \x01"), Malformed::Header),
        (head("a: b\rc"), Malformed::Header),
        (head("Content-Length: "), Malformed::Length),
        (head("Content-Length: -1"), Malformed::Length),
        (head("Content-Length: +1"), Malformed::Length),
        (head("Content-Length: 1, 1"), Malformed::Length),
        (head("Content-Length: 0x1"), Malformed::Length),
        (head("Content-Length: 1\r\nContent-Length: 1"), Malformed::Length),
        (head("Content-Length: 1\r\ncontent-length: 2"), Malformed::Length),
        (head("Content-Length: 51201"), Malformed::LongBody(LIMIT)),
        (head("Content-Length: 99999999999999999999999999"), Malformed::LongBody(LIMIT)),
        (head("Content-Length: 1\r\nTransfer-Encoding: chunked"), Malformed::Encoding),
        (head("Transfer-Encoding: chunked\r\nContent-Length: 0"), Malformed::Encoding),
        (head("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), Malformed::Encoding),
        (head("Transfer-Encoding: gzip, chunked"), Malformed::Encoding),
        ("PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(), Malformed::Encoding),
        (head("Expect: the worst"), Malformed::Expectation),
        (chunked("\r\n"), Malformed::Chunk),
        (chunked("-1\r\n"), Malformed::Chunk),
        (chunked("12345678901234567\r\n"), Malformed::Chunk),
        (chunked("1\r\nab\r\n"), Malformed::Chunk),
        (chunked("c801\r\n"), Malformed::LongBody(LIMIT)),
        (chunked("ffffffffffffffff\r\n"), Malformed::LongBody(LIMIT)),
        (chunked(&format!("c800\r\n{}\r\n1\r\n", long(LIMIT))), Malformed::LongBody(LIMIT)),
        (chunked("0\r\nno colon\r\n"), Malformed::Header),
        (head(&"a: b\r\n".repeat(200)), Malformed::ManyHeaders),
        (chunked(&format!("0\r\n{}", "a: b\r\n".repeat(200))), Malformed::ManyHeaders),
        (long(1026), Malformed::LongLine),
        (format!("{}\n", long(1025)), Malformed::LongLine),
        (head(&format!("a: {}", long(1022))), Malformed::LongLine),
    ] {
        let found = parse(text.as_bytes());
        let shown: String = text.chars().take(100).collect();
        assert_eq!(found, [Err(expected)], "{shown:?}");
    }
}

#[test]
fn lines_and_bodies_up_to_their_limits() {
    let path = format!("/{}", "x".repeat(MAX_LINE - "GET / HTTP/1.1".len()));
    assert_eq!(one(&format!("GET {path} HTTP/1.1\r\n\r\n")).0.path, path);
    let value = "x".repeat(MAX_LINE - "accept: ".len());
    assert_eq!(one(&format!("GET / HTTP/1.1\r\naccept: {value}\r\n\r\n")).0.accept, Some(value));
    let body = "x".repeat(LIMIT);
    assert_eq!(one(&format!("PUT / HTTP/1.1\r\nContent-Length: {LIMIT}\r\n\r\n{body}")).0.body, body.as_bytes());
    let chunked =
        format!("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nc7ff\r\n{}\r\n1\r\nx\r\n0\r\n\r\n", &body[1..]);
    assert_eq!(one(&chunked).0.body, body.as_bytes());
}

#[test]
fn a_body_is_waited_for_by_continue_only_if_there_is_one() {
    let expects = |rest: &str| parse(format!("PUT / HTTP/1.1\r\nExpect: 100-Continue\r\n{rest}").as_bytes());
    for rest in ["Content-Length: 1\r\n\r\nx", "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"] {
        let found = expects(rest);
        assert!(matches!(found[..], [Ok(Parsed::Continue), Ok(Parsed::Request { .. })]), "{found:?}");
    }
    for rest in ["\r\n", "Content-Length: 0\r\n\r\n"] {
        assert!(matches!(expects(rest)[..], [Ok(Parsed::Request { .. })]));
    }
    let old = parse(b"PUT / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx");
    assert!(matches!(old[..], [Ok(Parsed::Request { .. })]));
    assert_eq!(expects("Content-Length: 1000000\r\n\r\n"), [Err(Malformed::LongBody(LIMIT))]);
}

#[test]
fn it_is_idle_only_between_requests() {
    let mut parser = Parser::new(LIMIT);
    for (bytes, idle) in
        [("\r\n", true), ("G", false), ("ET / HTTP/1.1\r\n", false), ("A: b", false), ("\r\n\r\n", true)]
    {
        parser.feed(&mut bytes.as_bytes()).unwrap();
        assert_eq!(parser.is_idle(), idle, "{bytes:?}");
    }
}

fn rendered(response: &Response, framing: Framing, close: bool) -> String {
    let mut out = Vec::new();
    response.render(framing, close, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn answers_as_clients_expect_them() {
    let whole = |response: &Response| rendered(response, Framing::Length, false);
    assert_eq!(
        whole(&Response::no_content()),
        "HTTP/1.1 204 No Content\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    );
    assert_eq!(
        whole(&Response::json(400, "{}").deprecated(true)),
        "HTTP/1.1 400 Bad Request\r\nServer: Firecracker API\r\nConnection: keep-alive\r\nDeprecation: true\r\n\
         Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    );
    let empty = Response { status: 418, ..Response::no_content() };
    assert!(whole(&empty).ends_with("Content-Length: 0\r\n\r\n") && whole(&empty).starts_with("HTTP/1.1 418 \r\n"));
    let never = Response { status: 204, ..Response::json(200, "{}") };
    assert_eq!(whole(&never), whole(&Response::no_content()));
    let head = rendered(&Response::json(200, "{}"), Framing::HeadOnly, true);
    assert!(head.ends_with("Content-Length: 2\r\n\r\n") && head.contains("Connection: close\r\n"));
    let hostile = Response::no_content().with_header("Allow", "GET\r\nX: y");
    assert!(whole(&hostile).contains("Allow: GET  X: y\r\n"));
}

/// Bytes that come near to requests.
fn nearly_requests() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        Just("GET / HTTP/1.1\r\n"),
        Just("PUT /a HTTP/1.0\r\n"),
        Just("Content-Length: 3\r\n"),
        Just("Transfer-Encoding: chunked\r\n"),
        Just("Expect: 100-continue\r\n"),
        Just("Connection: close\r\n"),
        Just("\r\n"),
        Just("\n"),
        Just("3\r\nabc\r\n"),
        Just("0\r\n\r\n"),
        Just("abc"),
        Just(":"),
    ];
    let words = prop::collection::vec(word.prop_map(|word| word.as_bytes().to_vec()), 0..24);
    let noise = prop::collection::vec(any::<u8>(), 0..8);
    let long = (1000_usize..1100).prop_map(|len| vec![b'x'; len]);
    let mixed = prop_oneof![8 => words.prop_map(|words| words.concat()), 1 => noise, 1 => long];
    prop::collection::vec(mixed, 0..6).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn pieces_make_no_difference(bytes in nearly_requests(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8), limit in 0_usize..8) {
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([0, bytes.len()]).collect();
        cuts.sort_unstable();
        let whole = parse_pieces([bytes.as_slice()], limit);
        prop_assert_eq!(&whole, &parse_pieces(cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]), limit));
        prop_assert_eq!(&whole, &parse_pieces(bytes.chunks(1), limit));
    }

    #[test]
    fn requests_come_out_as_they_went_in(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..5),
        piece in 1_usize..300,
    ) {
        let bytes: Vec<u8> = bodies
            .iter()
            .flat_map(|body| [format!("PUT /x HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat())
            .collect();
        let found = parse_pieces(bytes.chunks(piece), LIMIT);
        prop_assert_eq!(found.len(), bodies.len());
        for (parsed, body) in found.into_iter().zip(bodies) {
            let Ok(Parsed::Request { request, close: false }) = parsed else { panic!("{parsed:?}") };
            prop_assert_eq!(request.body, body);
        }
    }
}
