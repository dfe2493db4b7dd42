use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{self, Receiver, Sender};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::api::client::{Client, ClientError};
use crate::api::http::Method;

/// Does what a path says.
struct Paths {
    later: Sender<(Request, Reply)>,
    streams: Sender<StreamSender>,
}

impl Service for Paths {
    fn call(&mut self, request: Request, reply: Reply) {
        let path = request.path.clone();
        match path.split('/').nth(1).unwrap_or_default() {
            "none" => reply.send(Response::no_content()),
            "echo" => reply.send(Response::new(200, "text/plain", request.body)),
            "what" => reply.send(Response::new(200, "text/plain", format!("{} {path}", request.method))),
            "big" => reply.send(Response::new(200, "text/plain", vec![b'x'; path[5..].parse().unwrap()])),
            "later" => self.later.send((request, reply)).unwrap(),
            "stream" => self.streams.send(reply.stream("text/plain")).unwrap(),
            _ => drop(reply),
        }
    }

    fn malformed(&self, status: u16, text: &str) -> Response {
        assert!(!text.is_empty());
        Response::json(status, format!("{{\"fault\":{status}}}"))
    }
}

/// A server and its clients' socket.
struct Rig {
    handle: ServerHandle,
    path: PathBuf,
    later: Receiver<(Request, Reply)>,
    streams: Receiver<StreamSender>,
    _dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (later, later_here) = mpsc::channel();
        let (streams, streams_here) = mpsc::channel();
        let listener = UnixListener::bind(&path).unwrap();
        let handle = Server::spawn(Clients::Listener(listener), "api", limits, Paths { later, streams }).unwrap();
        Self { handle, path, later: later_here, streams: streams_here, _dir: dir }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    /// Sends bytes and no more, and reads all that is answered.
    fn answers(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        answers
    }

    /// A client that came when there was room is served still.
    fn serves(&self) {
        assert_eq!(self.client().request("GET", "/none", None).unwrap().status, 204);
    }
}

fn statuses(answers: &str) -> Vec<&str> {
    answers.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\n\r\n").into_bytes()
}

/// Waits until the other end of the connection has been closed.
fn wait_for_end(stream: &mut impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        read => drop(read.unwrap()),
    }
    all
}

#[test]
fn a_connection_serves_one_request_after_the_other() {
    let rig = Rig::new();
    let mut client = rig.client();
    for number in 0..50 {
        let body = format!("{number}");
        let answer = client.request("PUT", "/echo", Some(body.as_bytes())).unwrap();
        assert_eq!((answer.status, answer.body), (200, body.into_bytes()));
        assert_eq!(client.request("GET", "/none", None).unwrap().status, 204);
    }
    let largest = vec![b'x'; Limits::default().max_body];
    assert_eq!(client.request("PUT", "/echo", Some(&largest)).unwrap().body, largest);
    assert_eq!(client.request("DELETE", "/what/x?y", None).unwrap().body, b"DELETE /what/x?y");
    assert_eq!(client.request("BREW", "/what", None).unwrap().body, b"BREW /what");
    assert_eq!(client.request("GET", "/drop", None).unwrap().status, 500);
    assert_eq!(client.request("GET", "/none", None).unwrap().status, 204);
}

#[test]
fn requests_sent_ahead_are_answered_in_order_and_one_at_a_time() {
    let rig = Rig::new();
    let mut stream = rig.connect();
    stream.write_all(&[get("/later/1"), get("/what/2"), get("/later/3"), get("/none")].concat()).unwrap();
    let (first, reply) = rig.later.recv().unwrap();
    assert_eq!((first.method, first.path.as_str()), (Method::Get, "/later/1"));
    rig.serves();
    assert!(rig.later.try_recv().is_err(), "the third request was served before the first was answered");
    std::thread::spawn(move || reply.send(Response::new(200, "text/plain", "one"))).join().unwrap();
    rig.later.recv().unwrap().1.send(Response::new(200, "text/plain", "three"));
    stream.shutdown(Shutdown::Write).unwrap();
    let answers = String::from_utf8(wait_for_end(&mut stream)).unwrap();
    assert_eq!(statuses(&answers), ["200", "200", "200", "204"]);
    let place = |text: &str| answers.find(text).unwrap();
    assert!(place("one") < place("GET /what/2") && place("GET /what/2") < place("three"), "{answers}");
}

#[test]
fn far_more_requests_than_any_buffer_holds_are_answered() {
    const COUNT: usize = 20_000;
    let rig = Rig::new();
    let mut stream = rig.connect();
    let mut writing = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        for _ in 0..COUNT {
            writing.write_all(&get("/what")).unwrap();
        }
        writing.shutdown(Shutdown::Write).unwrap();
    });
    let answers = String::from_utf8(wait_for_end(&mut stream)).unwrap();
    writer.join().unwrap();
    assert_eq!(answers.matches("GET /what").count(), COUNT);
}

#[test]
fn a_client_may_wait_with_its_body_until_it_is_wanted() {
    let rig = Rig::new();
    let mut stream = rig.connect();
    stream.write_all(b"PUT /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n").unwrap();
    let mut interim = [0; "HTTP/1.1 100 Continue\r\n\r\n".len()];
    stream.read_exact(&mut interim).unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"body").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(wait_for_end(&mut stream).ends_with(b"\r\n\r\nbody"));
    // It is told so before it has sent a body that is too long.
    let refused = rig.answers(b"PUT /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 51201\r\n\r\n");
    assert_eq!(statuses(&refused), ["400"]);
}

#[test]
fn the_connection_is_closed_when_the_client_wants_it() {
    let rig = Rig::new();
    let mut stream = rig.connect();
    stream.write_all(b"GET /none HTTP/1.1\r\nConnection: close\r\n\r\nGET /none HTTP/1.1\r\n\r\n").unwrap();
    let answers = String::from_utf8(wait_for_end(&mut stream)).unwrap();
    assert_eq!(statuses(&answers), ["204"]);
    assert!(answers.contains("Connection: close\r\n"));
    // HTTP/1.0 is kept alive, too.
    let answers = rig.answers(b"GET /none HTTP/1.0\r\n\r\nGET /what HTTP/1.0\r\n\r\n");
    assert_eq!(statuses(&answers), ["204", "200"]);
    assert!(answers.contains("Connection: keep-alive\r\n"));
}

#[test]
fn an_answer_to_head_has_no_body() {
    let answers = Rig::new().answers(b"HEAD /what HTTP/1.1\r\n\r\nGET /none HTTP/1.1\r\n\r\n");
    assert_eq!(statuses(&answers), ["200", "204"]);
    assert!(answers.contains("Content-Length: 10\r\n") && !answers.contains("HEAD"), "{answers}");
}

#[test]
fn nonsense_is_answered_and_ends_its_connection_alone() {
    let rig = Rig::new();
    let mut other = rig.client();
    for bytes in [
        &b"\x16\x03\x01\x02\0\x01\n"[..],
        b"GET nope HTTP/1.1\r\n\r\n",
        b"GET / HTTP/3\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n12345",
        b"PUT / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n",
        &[b'x'; 5000],
    ] {
        let answers = rig.answers(&[&get("/none"), bytes, &get("/none")].concat());
        assert_eq!(statuses(&answers), ["204", "400"], "{}", String::from_utf8_lossy(bytes));
        assert!(answers.contains("Connection: close\r\n") && answers.ends_with("{\"fault\":400}"));
        assert_eq!(other.request("GET", "/none", None).unwrap().status, 204);
    }
}

#[test]
fn whoever_sends_a_body_that_is_too_long_can_read_why_it_was_refused() {
    let rig = Rig::new();
    for len in [60_000, 3 << 20] {
        let answer = rig.client().request("PUT", "/echo", Some(&vec![0; len])).unwrap();
        assert_eq!(answer.status, 400, "{len}");
    }
    // Within reason.
    let mut stream = rig.connect();
    stream.write_all(b"PUT / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n").unwrap();
    let mut sent = 0_usize;
    while stream.write_all(&[0; 4096]).is_ok() {
        sent += 4096;
        assert!(sent < 100 << 20, "the server reads on for ever");
    }
    rig.serves();
}

#[test]
fn clients_that_leave_in_the_middle_leave_nothing_behind() {
    let rig = Rig::new();
    for bytes in [&b""[..], b"G", b"PUT /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\n12", &get("/big/1000000")] {
        for _ in 0..30 {
            rig.connect().write_all(bytes).unwrap();
        }
    }
    // Their ends and the next client's beginning come to the server in order.
    rig.serves();
}

#[test]
fn clients_that_hang_do_not_disturb_others() {
    let rig = Rig::new();
    let hang = |bytes: &[u8]| {
        let mut stream = rig.connect();
        stream.write_all(bytes).unwrap();
        stream
    };
    // Nothing, half a line, half a body, an answer that is not read, requests ahead of it.
    let _hanging = [
        hang(b""),
        hang(b"GET / HT"),
        hang(b"PUT /echo HTTP/1.1\r\nContent-Length: 51200\r\n\r\nx"),
        hang(&get("/big/5000000")),
        hang(&get("/big/100000").repeat(20)),
    ];
    let mut client = rig.client();
    for _ in 0..100 {
        assert_eq!(client.request("GET", "/big/1000", None).unwrap().body.len(), 1000);
    }
}

#[test]
fn nobody_keeps_the_server_awake() {
    let rig = Rig::new();
    let mut clients = Vec::new();
    let mut replies = Vec::new();
    let mut streams = Vec::new();
    let mut rests = |bytes: &[u8], ending: Option<Shutdown>, stays: bool| {
        let mut stream = rig.connect();
        stream.write_all(bytes).unwrap();
        if let Some(ending) = ending {
            stream.shutdown(ending).unwrap();
        }
        if bytes.starts_with(b"GET /later") {
            replies.push(rig.later.recv().unwrap());
        } else if bytes.starts_with(b"GET /stream") {
            streams.push(rig.streams.recv().unwrap());
        }
        clients.extend(stays.then_some(stream));
        std::thread::sleep(Duration::from_millis(20));
        // Far more than there can be reasons for, and far less than a loop without rest takes.
        let slept = rig.handle.post.sleeps.load(std::sync::atomic::Ordering::Relaxed);
        assert!(slept < 200, "{slept} times awake after {}", String::from_utf8_lossy(&bytes[..20.min(bytes.len())]));
    };
    rests(b"GET /", None, true);
    rests(&[get("/later"), get("/none").repeat(20)].concat(), None, true);
    rests(&get("/later"), Some(Shutdown::Write), true);
    rests(&get("/later"), None, false);
    rests(&get("/stream"), Some(Shutdown::Write), true);
    rests(&[get("/stream"), get("/none")].concat(), None, true);
    rests(&[get("/big/5000000"), get("/none")].concat(), Some(Shutdown::Write), true);
    rests(b"nonsense\r\n", None, true);
    rests(&get("/none"), Some(Shutdown::Read), true);
    rests(b"", None, true);
    // One too many, or more.
    (0..6).for_each(|_| rests(&get("/none"), None, true));
}

#[test]
fn descriptors_that_come_with_a_request_are_let_go() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::os::fd::AsFd;
    let rig = Rig::new();
    let mut stream = rig.connect();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    // Bytes before and after them come in pieces of their own.
    stream.write_all(b"GET /wh").unwrap();
    {
        let fds = [theirs.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        assert!(message.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&stream, &[io::IoSlice::new(b"at HTTP")], &mut message, SendFlags::empty()).unwrap();
    }
    stream.write_all(b"/1.1\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(wait_for_end(&mut stream).ends_with(b"GET /what"));
    theirs.write_all(b"x").unwrap();
    drop(theirs);
    assert_eq!(wait_for_end(&mut &ours.try_clone().unwrap()), b"x");
}

#[test]
fn an_answer_longer_than_a_socket_holds_comes_whole() {
    let rig = Rig::new();
    let mut client = rig.client();
    for _ in 0..3 {
        assert_eq!(client.request("GET", "/big/3000000", None).unwrap().body.len(), 3_000_000);
    }
}

#[test]
fn one_client_too_many_is_told_so() {
    let rig = Rig::new();
    let mut clients: Vec<_> = (0..10).map(|_| rig.client()).collect();
    for client in &mut clients {
        assert_eq!(client.request("GET", "/none", None).unwrap().status, 204);
    }
    // Whether they ask or not, and however many they are.
    let silent: Vec<_> = (0..20).map(|_| rig.connect()).collect();
    assert_eq!(rig.client().request("GET", "/none", None).unwrap().status, 503);
    for mut stream in silent {
        let answers = String::from_utf8(wait_for_end(&mut stream)).unwrap();
        assert_eq!(statuses(&answers), ["503"]);
        assert!(answers.contains("Connection: close\r\n"));
    }
    for client in &mut clients {
        assert_eq!(client.request("GET", "/none", None).unwrap().status, 204);
    }
    clients.pop();
    rig.serves();
}

#[test]
fn who_left_a_request_unfinished_for_long_gives_way() {
    let rig = Rig::with(Limits { connections: 2, patience: Duration::ZERO, ..Limits::default() });
    let mut idle = rig.client();
    assert_eq!(idle.request("GET", "/none", None).unwrap().status, 204);
    for bytes in [&b"GET /"[..], &get("/big/5000000"), b"nonsense\r\n"] {
        let mut hanging = rig.connect();
        hanging.write_all(bytes).unwrap();
        // It has been read when this one is answered.
        assert_eq!(idle.request("GET", "/none", None).unwrap().status, 204);
        let mut newcomer = rig.client();
        assert_eq!(newcomer.request("GET", "/none", None).unwrap().status, 204);
        wait_for_end(&mut hanging);
        // Nobody hangs now.
        assert_eq!(rig.client().request("GET", "/none", None).unwrap().status, 503);
    }
    assert_eq!(idle.request("GET", "/none", None).unwrap().status, 204);
}

#[test]
fn who_waits_for_an_answer_does_not_give_way() {
    let rig = Rig::with(Limits { connections: 1, patience: Duration::ZERO, ..Limits::default() });
    let mut waiting = rig.connect();
    waiting.write_all(&get("/later")).unwrap();
    let (_, reply) = rig.later.recv().unwrap();
    assert_eq!(rig.client().request("GET", "/none", None).unwrap().status, 503);
    reply.send(Response::no_content());
    waiting.shutdown(Shutdown::Write).unwrap();
    assert!(wait_for_end(&mut waiting).starts_with(b"HTTP/1.1 204"));
}

#[test]
fn requests_of_clients_that_have_left_count_until_they_are_answered() {
    let rig = Rig::with(Limits { connections: 1, ..Limits::default() });
    rig.connect().write_all(&get("/later")).unwrap();
    let (_, reply) = rig.later.recv().unwrap();
    for _ in 0..10 {
        assert_eq!(rig.client().request("GET", "/none", None).unwrap().status, 503);
    }
    reply.send(Response::no_content());
    rig.serves();
}

#[test]
fn a_stream_comes_bit_by_bit_and_the_connection_lives_on() {
    let rig = Rig::new();
    let mut raw = rig.connect();
    raw.write_all(&[get("/stream"), get("/what")].concat()).unwrap();
    let sender = rig.streams.recv().unwrap();
    let mut following = rig.client().stream("GET", "/stream", None).unwrap();
    let followed = rig.streams.recv().unwrap();
    assert_eq!((following.status, following.content_type.as_deref()), (200, Some("text/plain")));
    for number in 0..100 {
        let line = format!("{number}\n");
        followed.send(line.as_bytes()).unwrap();
        assert_eq!(following.next_line().unwrap().unwrap(), number.to_string().as_bytes());
        sender.send(line.as_bytes()).unwrap();
        sender.send(b"").unwrap();
    }
    drop(followed);
    assert_eq!(following.next_line().unwrap(), None);
    drop(sender);
    raw.shutdown(Shutdown::Write).unwrap();
    let answers = String::from_utf8(wait_for_end(&mut raw)).unwrap();
    assert_eq!(statuses(&answers), ["200", "200"]);
    assert!(answers.contains("Transfer-Encoding: chunked\r\n\r\n2\r\n0\n\r\n2\r\n1\n\r\n"), "{answers}");
    assert!(answers.contains("3\r\n99\n\r\n0\r\n\r\nHTTP/1.1 200 OK"), "{answers}");
}

#[test]
fn a_stream_of_http_1_0_ends_with_its_connection() {
    let rig = Rig::new();
    let mut stream = rig.connect();
    stream.write_all(b"GET /stream HTTP/1.0\r\n\r\n").unwrap();
    let sender = rig.streams.recv().unwrap();
    sender.send(b"a\n").unwrap();
    sender.send(b"b\n").unwrap();
    drop(sender);
    let answer = String::from_utf8(wait_for_end(&mut stream)).unwrap();
    assert!(answer.ends_with("\r\n\r\na\nb\n") && answer.contains("Connection: close\r\n"), "{answer}");
    assert!(!answer.contains("chunked"));
}

#[test]
fn whoever_sends_a_stream_learns_that_its_client_is_gone() {
    let rig = Rig::with(Limits { connections: 1, ..Limits::default() });
    for _ in 0..20 {
        let mut stream = rig.connect();
        stream.write_all(&get("/stream")).unwrap();
        let sender = rig.streams.recv().unwrap();
        sender.send(b"x").unwrap();
        assert!(!sender.is_closed());
        drop(stream);
        while !sender.is_closed() {
            std::thread::yield_now();
        }
        assert_eq!(sender.send(b"x"), Err(StreamError::Closed));
        // Its place is free, though the sender is still there.
        rig.serves();
    }
}

#[test]
fn who_does_not_read_a_stream_loses_it() {
    let rig = Rig::new();
    let mut stream = rig.connect();
    stream.write_all(&get("/stream")).unwrap();
    let sender = rig.streams.recv().unwrap();
    let mut sent = 0_usize;
    let error = loop {
        match sender.send(&[b'x'; 1000]) {
            Ok(()) => sent += 1000,
            Err(error) => break error,
        }
        assert!(sent < 100 << 20, "it is buffered without end");
    };
    assert_eq!(error, StreamError::TooSlow);
    assert_eq!(sender.send(b"x"), Err(StreamError::Closed));
    // Cut off, not ended.
    assert!(!wait_for_end(&mut stream).ends_with(b"0\r\n\r\n"));
    rig.serves();
}

#[test]
fn more_than_fits_at_once_is_too_much_for_a_stream() {
    let rig = Rig::new();
    let mut following = rig.client().stream("GET", "/stream", None).unwrap();
    let sender = rig.streams.recv().unwrap();
    sender.send(&[b'x'; STREAM_BUFFER]).unwrap();
    assert_eq!(following.next_bytes().unwrap().unwrap()[0], b'x');
    assert_eq!(sender.send(&[b'x'; STREAM_BUFFER + 1]), Err(StreamError::TooSlow));
    let ended = std::iter::from_fn(|| following.next_bytes().transpose()).find_map(Result::err);
    assert!(matches!(ended, Some(ClientError::Closed | ClientError::Connection(_))), "{ended:?}");
}

#[test]
fn a_stopped_server_has_sent_its_last_answers() {
    for _ in 0..20 {
        let rig = Rig::new();
        let mut stream = rig.connect();
        stream.write_all(&get("/later")).unwrap();
        let (_, reply) = rig.later.recv().unwrap();
        reply.send(Response::json(400, "{}"));
        rig.handle.stop();
        assert!(wait_for_end(&mut stream).ends_with(b"{}"));
        assert!(rig.streams.recv().is_err(), "the service is still there");
    }
}

#[test]
fn replies_outlive_their_server() {
    let rig = Rig::new();
    rig.connect().write_all(&[get("/later"), get("/later")].concat()).unwrap();
    rig.connect().write_all(&get("/stream")).unwrap();
    let (_, reply) = rig.later.recv().unwrap();
    let sender = rig.streams.recv().unwrap();
    rig.handle.stop();
    reply.send(Response::no_content());
    let _ = sender.send(b"x");
}

#[test]
fn a_service_can_be_tried_without_a_server() {
    let (later, _later) = mpsc::channel();
    let (streams, streams_here) = mpsc::channel();
    let mut service = Paths { later, streams };
    let mut ask = |path: &str| {
        let (reply, replied) = Reply::detached();
        let version = crate::api::http::Version::Http11;
        let request = Request { method: Method::Get, path: path.into(), version, accept: None, body: Vec::new() };
        service.call(request, reply);
        replied.take().map(|response| response.status)
    };
    assert_eq!([ask("/none"), ask("/drop"), ask("/stream"), ask("/later")], [Some(204), Some(500), Some(200), None]);
    drop(streams_here);
}

#[test]
fn curl_is_served() {
    let rig = Rig::new();
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("long");
    std::fs::write(&long, vec![b'x'; 2 << 20]).unwrap();
    let curl = |arguments: &[&str]| {
        let socket = rig.path.to_str().unwrap();
        let mut command = Command::new("curl");
        command.args(["-sS", "--max-time", "60", "--unix-socket", socket, "-w", " %{http_code}"]).args(arguments);
        match command.output() {
            Ok(output) => Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => panic!("{error}"),
        }
    };
    let data = format!("@{}", long.display());
    for (arguments, expected) in [
        (vec!["http://localhost/what/x?y"], "GET /what/x?y 200"),
        (vec!["-X", "PUT", "-d", "{\"a\": 1}", "http://localhost/echo"], "{\"a\": 1} 200"),
        (vec!["-H", "Expect: 100-continue", "-T", "/dev/null", "http://localhost/echo"], " 200"),
        (vec!["-H", "Transfer-Encoding: chunked", "-X", "PATCH", "-d", "abc", "http://localhost/echo"], "abc 200"),
        (vec!["-0", "http://localhost/what"], "GET /what 200"),
        (vec!["-X", "DELETE", "http://localhost/none"], " 204"),
        (vec!["-X", "PUT", "--data-binary", &data, "http://localhost/echo"], "{\"fault\":400} 400"),
        (vec!["-H", "Expect:", "-X", "PUT", "--data-binary", &data, "http://localhost/echo"], "{\"fault\":400} 400"),
        (vec!["http://localhost/none", "http://localhost/what"], " 204GET /what 200"),
    ] {
        let Some(answer) = curl(&arguments) else {
            return println!("curl is not installed");
        };
        assert_eq!(answer, expected, "{arguments:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_same_bytes_get_the_same_answers_however_they_come(
        parts in prop::collection::vec(prop_oneof![
            Just(get("/none")),
            Just(get("/what")),
            Just(get("/drop")),
            Just(get("/big/3000")),
            Just(b"PUT /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc".to_vec()),
            Just(b"PUT /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".to_vec()),
            Just(b"PUT /echo HTTP/1.0\r\nConnection: close\r\n\r\n".to_vec()),
            prop::collection::vec(any::<u8>(), 0..20),
        ], 0..8),
        piece in 1_usize..200,
    ) {
        let rig = Rig::new();
        let bytes = parts.concat();
        let whole = rig.answers(&bytes);
        let mut stream = rig.connect();
        for piece in bytes.chunks(piece) {
            stream.write_all(piece).unwrap();
            std::thread::yield_now();
        }
        stream.shutdown(Shutdown::Write).unwrap();
        prop_assert_eq!(whole, String::from_utf8(wait_for_end(&mut stream)).unwrap());
        rig.serves();
    }
}
