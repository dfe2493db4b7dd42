//! Firecracker's API: its paths, bodies, answers and error texts.

mod routes;

use std::sync::Arc;

use serde::Serialize;

pub use self::routes::{BadRequest, Routed, route};

use super::counters::ApiCounters;
use super::http::{Request, Response};
use super::server::Reply;
use crate::control::{Answer, CallSender};

/// The body of an error.
#[derive(Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Fault {
    pub fault_message: String,
}

/// An error as Firecracker's clients expect it.
pub fn fault(status: u16, text: &str) -> Response {
    let body = serde_json::to_vec(&Fault { fault_message: text.to_owned() });
    Response::json(status, body.unwrap_or_default())
}

/// Hands a request on to the owner, or answers why it cannot be.
pub fn serve(request: &Request, reply: Reply, owner: &CallSender, counters: &Arc<ApiCounters>) {
    log_request(request);
    let place = ApiCounters::place(request.method.as_str(), &request.path);
    let counters = counters.clone();
    match route(&request.method, &request.path, &request.body) {
        Ok(Routed { call, deprecated }) => owner.send(
            call,
            Box::new(move |answer| {
                counters.count(place, answer.is_err(), deprecated);
                let answer = answer.map_err(|fault| fault.to_string());
                finish(reply, deprecated, answer);
            }),
        ),
        Err(error) => {
            counters.count(place, true, error.is_deprecated());
            finish(reply, error.is_deprecated(), Err(error.to_string()));
        }
    }
}

fn finish(reply: Reply, deprecated: bool, answer: Result<Answer, String>) {
    let response = match answer {
        Ok(answer) => {
            let response = match answer {
                Answer::Done => Response::no_content(),
                Answer::Json(body) | Answer::Text(body) => Response::json(200, body),
            };
            let title = if response.status == 204 { "No Content" } else { "OK" };
            tracing::info!("The request was executed successfully. Status code: {} {title}.", response.status);
            response
        }
        Err(text) => {
            tracing::error!("Received Error. Status code: 400 Bad Request. Message: {text}");
            fault(400, &text)
        }
    };
    reply.send(response.deprecated(deprecated));
}

/// The line that tools look for.
fn log_request(request: &Request) {
    let method = match request.method.as_str() {
        "GET" => "Get",
        "PUT" => "Put",
        "PATCH" => "Patch",
        "DELETE" => "Delete",
        _ => "Unknown",
    };
    let path = &request.path;
    // The metadata service's data may be secret.
    if request.body.is_empty() || path.starts_with("/mmds") {
        tracing::info!("The API server received a {method} request on \"{path}\".");
    } else {
        let body = String::from_utf8_lossy(&request.body);
        tracing::info!("The API server received a {method} request on \"{path}\" with body {body:?}.");
    }
}
