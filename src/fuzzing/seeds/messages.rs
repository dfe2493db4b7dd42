//! What clients and servers of the API say.

use super::plant;
use crate::api::http::Parsed;
use crate::fuzzing::messages::requests;

#[test]
fn requests_of_clients() {
    for (name, text, parsed) in [
        ("curl", "GET /version HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.14.1\r\nAccept: */*\r\n\r\n", 1),
        (
            "put",
            "PUT http://localhost/actions HTTP/1.1\r\ncontent-length: 31\r\nConnection: close\r\n\r\n{\"action_type\":\"InstanceStart\"}",
            1,
        ),
        ("continue", "PATCH /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", 2),
        ("chunked", "PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nTrailer: x\r\n\r\n", 1),
        ("ahead", "\nDELETE /drives/a HTTP/1.0\n\nGET / HTTP/1.1\r\n\r\n", 2),
    ] {
        let found = requests(text.as_bytes(), 7);
        assert!(found.iter().all(Result::is_ok) && found.len() == parsed, "{name}: {found:?}");
        assert!(matches!(found.last(), Some(Ok(Parsed::Request { .. }))), "{name}: {found:?}");
        plant("http", name, &[&[7], text.as_bytes()].concat());
    }
}

#[test]
fn answers_of_servers() {
    for (name, text) in [
        ("answer", "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"),
        ("no-content", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 \r\n\r\n"),
        ("stream", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\n\r\n"),
        ("until-close", "HTTP/1.0 200 OK\r\n\r\na\nb"),
    ] {
        plant("http", name, &[&[7], text.as_bytes()].concat());
    }
}
