//! Our own API, below `/v2`: honest statuses, and errors as RFC 9457 has them.

use std::io::Read;

use flate2::read::DeflateDecoder;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::http::{Method, Request, Response};
use super::server::Reply;
use crate::control::{Answer, Call, CallSender, Fault, FaultKind, Power};

/// A problem document (RFC 9457, section 3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Problem {
    /// `about:blank`: the status says what kind of problem it is.
    pub r#type: String,
    pub title: String,
    pub status: u16,
    /// What is wrong this time.
    pub detail: String,
}

/// The kind of text that Prometheus reads.
pub const PROMETHEUS: &str = "text/plain; version=0.0.4";
/// Both APIs, described. A test derives it from the types; the program carries the result alone.
const OPENAPI: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/openapi.deflate"));
const PROBLEM: &str = "application/problem+json";

/// The body of `PUT /v2/vm/power`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PowerRequest {
    pub power: Power,
}

/// An error of a status that this API has.
pub fn problem(status: u16, detail: &str) -> Response {
    let title = match status {
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    };
    let problem = Problem { r#type: "about:blank".into(), title: title.into(), status, detail: detail.into() };
    Response::new(status, PROBLEM, serde_json::to_vec(&problem).unwrap_or_default())
}

fn fault(fault: &Fault) -> Response {
    let status = match fault.kind() {
        FaultKind::Invalid => 400,
        FaultKind::NotFound => 404,
        FaultKind::Conflict => 409,
        FaultKind::Missing => 501,
        FaultKind::Host => 500,
    };
    problem(status, &fault.to_string())
}

/// Where a request goes.
enum Route {
    Call(Call),
    Events,
    OpenApi,
}

/// The paths there are, and what each takes.
const PATHS: [(&str, &str); 8] = [
    ("/v2/vm", "GET"),
    ("/v2/vm/power", "PUT"),
    ("/v2/vm/resize", "PUT"),
    ("/v2/vm/restore", "PUT"),
    ("/v2/vm/snapshot", "PUT"),
    ("/v2/events", "GET"),
    ("/v2/metrics", "GET"),
    ("/v2/openapi.json", "GET"),
];

fn route(request: &Request) -> Result<Route, Response> {
    let path = request.path.split('?').next().unwrap_or_default();
    let Some((_, method)) = PATHS.iter().find(|known| known.0 == path) else {
        return Err(problem(404, &format!("There is nothing at {path}.")));
    };
    if request.method.as_str() != *method {
        let refused = problem(405, &format!("{path} takes {method}, not {}.", request.method));
        return Err(refused.with_header("Allow", *method));
    }
    if request.method == Method::Get && !request.body.is_empty() {
        return Err(problem(400, "A GET request cannot have a body."));
    }
    Ok(match path {
        "/v2/vm" => Route::Call(Call::GetVm),
        "/v2/events" => Route::Events,
        "/v2/metrics" => Route::Call(Call::GetMetrics),
        "/v2/openapi.json" => Route::OpenApi,
        "/v2/vm/resize" => Route::Call(Call::Resize(parse(request)?)),
        "/v2/vm/restore" => Route::Call(Call::Restore(parse(request)?)),
        "/v2/vm/snapshot" => Route::Call(Call::Snapshot(parse(request)?)),
        _ => Route::Call(Call::Power(parse::<PowerRequest>(request)?.power)),
    })
}

/// The call that a request is, if it is one.
pub fn call_of(request: &Request) -> Option<Call> {
    match route(request) {
        Ok(Route::Call(call)) => Some(call),
        _ => None,
    }
}

fn parse<T: DeserializeOwned>(request: &Request) -> Result<T, Response> {
    let parsed = serde_json::from_slice(&request.body);
    parsed.map_err(|error| problem(400, &format!("The body cannot be read: {error}.")))
}

/// Answers a request, or hands it on to the owner.
pub fn serve(request: &Request, reply: Reply, owner: &CallSender) {
    match route(request) {
        Err(response) => reply.send(response),
        // Nobody is to wait here for what another has asked for, as Firecracker's clients do.
        Ok(Route::Call(call)) => owner.send_unless_busy(
            call,
            Box::new(move |answer| {
                reply.send(match answer {
                    Ok(Answer::Done) => Response::no_content(),
                    Ok(Answer::Json(body)) => Response::json(200, body),
                    Ok(Answer::Text(body)) => Response::new(200, PROMETHEUS, body),
                    Err(error) => fault(&error),
                });
            }),
        ),
        Ok(Route::Events) => {
            let events = reply.stream("application/x-ndjson");
            owner.subscribe(Box::new(move |line| events.send(line.as_bytes()).is_ok() && !events.is_closed()));
        }
        Ok(Route::OpenApi) => {
            let mut document = Vec::new();
            reply.send(match DeflateDecoder::new(OPENAPI).read_to_end(&mut document) {
                Ok(_) => Response::json(200, document),
                Err(error) => problem(500, &format!("The document cannot be unpacked: {error}.")),
            });
        }
    }
}
