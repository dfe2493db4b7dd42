//! The description of both APIs, OpenAPI 3.1, derived from the types that are read and written: docs/openapi.json has to be
//! this. It is derived in tests only, as that takes a megabyte of code.

use std::collections::BTreeMap;
use utoipa::ToSchema;

use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItemBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, OpenApiBuilder, PathsBuilder, Ref, RefOr, Required,
    ResponseBuilder, ResponsesBuilder,
};

use super::firecracker::Fault;
use super::v2::{PowerRequest, Problem};
use crate::config::firecracker as fc;
use crate::control::{ResizeRequest, RestoreRequest, SnapshotRequest, SnapshotTimes, views};

type Schemas = Vec<(String, RefOr<Schema>)>;

/// A schema by its name, and how to collect it and what it is made of.
struct Named {
    name: String,
    collect: fn(&mut Schemas),
}

fn of<T: ToSchema>() -> Named {
    fn collect<T: ToSchema>(schemas: &mut Schemas) {
        schemas.push((T::name().into_owned(), T::schema()));
        T::schemas(schemas);
    }
    Named { name: T::name().into_owned(), collect: collect::<T> }
}

/// What an operation takes.
enum Takes {
    Nothing,
    Body(Named),
    /// Any JSON.
    Anything,
}

/// What an operation gives when all is well.
enum Gives {
    Nothing,
    Json(Named),
    /// A description of itself.
    Document,
    Text(&'static str),
}

struct Operation {
    path: &'static str,
    method: HttpMethod,
    summary: &'static str,
    takes: Takes,
    gives: Gives,
}

/// Every operation there is. Those of features to come are there too: they answer 400.
fn operations() -> Vec<Operation> {
    use HttpMethod::{Delete, Get, Patch, Put};
    let mut all = Vec::new();
    let mut add = |path, method, summary, takes, gives| all.push(Operation { path, method, summary, takes, gives });
    let nothing = || Takes::Nothing;
    add("/", Get, "Id, state and version of the VM", nothing(), Gives::Json(of::<views::Instance>()));
    add("/version", Get, "Version of the interface", nothing(), Gives::Json(of::<views::Version>()));
    add("/vm/config", Get, "The whole configuration", nothing(), Gives::Json(of::<fc::VmDescription>()));
    add("/machine-config", Get, "CPUs and memory", nothing(), Gives::Json(of::<fc::MachineConfig>()));
    let mut change = |path, method, summary, body| add(path, method, summary, Takes::Body(body), Gives::Nothing);
    change("/vm", Patch, "Pause or resume", of::<fc::VmPatch>());
    change("/actions", Put, "Start the VM, press its power button, or write metrics", of::<fc::Action>());
    change("/boot-source", Put, "Kernel, initrd and arguments", of::<fc::BootSource>());
    change("/machine-config", Put, "CPUs and memory", of::<fc::MachineConfig>());
    change("/machine-config", Patch, "CPUs and memory, in part", of::<fc::MachineConfigPatch>());
    change("/cpu-config", Put, "CPUID, MSRs and demands on KVM", of::<fc::CpuConfig>());
    change("/drives/{id}", Put, "Add or replace a drive; with PCI also in a running VM", of::<fc::Drive>());
    change("/drives/{id}", Patch, "Another file or other limits", of::<fc::DrivePatch>());
    let nic = of::<fc::NetworkInterface>();
    change("/network-interfaces/{id}", Put, "Add or replace a network card; with PCI also in a running VM", nic);
    change("/network-interfaces/{id}", Patch, "Other limits", of::<fc::NetworkPatch>());
    change("/entropy", Put, "An entropy device", of::<fc::Entropy>());
    change("/serial", Put, "Where the serial port's output goes", of::<fc::Serial>());
    change("/logger", Put, "What is logged, and where", of::<fc::Logger>());
    change("/metrics", Put, "Where metrics go", of::<fc::Metrics>());
    change("/pmem/{id}", Put, "Not supported yet", of::<fc::Pmem>());
    change("/pmem/{id}", Patch, "Not supported yet", of::<fc::PmemPatch>());
    change("/vsock", Put, "Not supported yet", of::<fc::Vsock>());
    change("/balloon", Put, "Not supported yet", of::<fc::Balloon>());
    change("/balloon", Patch, "Not supported yet", of::<fc::BalloonPatch>());
    change("/balloon/statistics", Patch, "Not supported yet", of::<fc::BalloonStatisticsPatch>());
    change("/balloon/hinting/start", Patch, "Not supported yet", of::<fc::HintingStart>());
    change("/hotplug/memory", Put, "Not supported yet", of::<fc::HotplugMemory>());
    change("/hotplug/memory", Patch, "Not supported yet", of::<fc::HotplugMemoryPatch>());
    change("/mmds/config", Put, "Not supported yet", of::<fc::MmdsConfig>());
    change("/snapshot/create", Put, "Save a paused VM in two files", of::<fc::SnapshotCreate>());
    change("/snapshot/load", Put, "A VM that was saved in two files", of::<fc::SnapshotLoad>());
    change("/v2/vm/power", Put, "Start, power button, reset, or end", of::<PowerRequest>());
    change(
        "/v2/vm/resize",
        Put,
        "Another size: CPUs and memory from the next start on, disks at once",
        of::<ResizeRequest>(),
    );
    change("/v2/vm/restore", Put, "A VM that was saved in a directory", of::<RestoreRequest>());
    for path in ["/balloon", "/balloon/statistics", "/balloon/hinting/status", "/mmds", "/hotplug/memory"] {
        add(path, Get, "Not supported yet", nothing(), Gives::Nothing);
    }
    let snapshot = Takes::Body(of::<SnapshotRequest>());
    add("/v2/vm/snapshot", Put, "Save the VM in a directory", snapshot, Gives::Json(of::<SnapshotTimes>()));
    add("/mmds", Put, "Not supported yet", Takes::Anything, Gives::Nothing);
    add("/mmds", Patch, "Not supported yet", Takes::Anything, Gives::Nothing);
    add("/balloon/hinting/stop", Patch, "Not supported yet", nothing(), Gives::Nothing);
    add("/drives/{id}", Delete, "Have the guest let go of a drive", nothing(), Gives::Nothing);
    add("/network-interfaces/{id}", Delete, "Have the guest let go of a card", nothing(), Gives::Nothing);
    add("/pmem/{id}", Delete, "Not supported yet", nothing(), Gives::Nothing);
    add("/v2/vm", Get, "State and devices", nothing(), Gives::Json(of::<views::Vm>()));
    add(
        "/v2/events",
        Get,
        "A JSON line for each change, as it happens",
        nothing(),
        Gives::Text("application/x-ndjson"),
    );
    add("/v2/metrics", Get, "Metrics, as Prometheus reads them", nothing(), Gives::Text(super::v2::PROMETHEUS));
    add("/v2/openapi.json", Get, "This document", nothing(), Gives::Document);
    all
}

/// The document.
#[must_use]
pub fn document() -> String {
    let mut schemas = Schemas::new();
    let mut items = BTreeMap::<_, PathItemBuilder>::new();
    for operation in operations() {
        let method = operation.method.clone();
        let path = operation.path;
        let built = build(operation, &mut schemas);
        let item = items.remove(path).unwrap_or_default();
        items.insert(path, item.operation(method, built));
    }
    let paths = items.into_iter().fold(PathsBuilder::new(), |paths, (path, item)| paths.path(path, item.build()));
    for named in [of::<Fault>(), of::<Problem>()] {
        (named.collect)(&mut schemas);
    }
    let info = InfoBuilder::new()
        .title("Tranche")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("A VM's API on its unix socket: Firecracker's, and below /v2 Tranche's own."));
    let components = ComponentsBuilder::new().schemas_from_iter(schemas).build();
    let document = OpenApiBuilder::new().info(info.build()).paths(paths).components(Some(components)).build();
    document.to_json().unwrap_or_default() + "\n"
}

fn build(operation: Operation, schemas: &mut Schemas) -> OperationBuilder {
    let ours = operation.path.starts_with("/v2");
    let mut built = OperationBuilder::new().summary(Some(operation.summary));
    if operation.path.contains("{id}") {
        let id = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[A-Za-z0-9_]+$")).build();
        let id = ParameterBuilder::new()
            .name("id")
            .parameter_in(ParameterIn::Path)
            .required(Required::True)
            .schema(Some(id));
        built = built.parameter(id);
    }
    let body = match operation.takes {
        Takes::Nothing => None,
        Takes::Anything => Some(RefOr::T(Schema::Object(ObjectBuilder::new().build()))),
        Takes::Body(named) => {
            (named.collect)(schemas);
            Some(Ref::from_schema_name(named.name).into())
        }
    };
    let json = |schema: RefOr<Schema>| ContentBuilder::new().schema(Some(schema)).build();
    let has_body = body.is_some();
    if let Some(body) = body {
        let body = RequestBodyBuilder::new().content("application/json", json(body)).required(Some(Required::True));
        built = built.request_body(Some(body.build()));
    }
    let mut responses = ResponsesBuilder::new();
    let good = ResponseBuilder::new().description("Done");
    responses = match operation.gives {
        Gives::Nothing => responses.response("204", good.build()),
        Gives::Json(named) => {
            (named.collect)(schemas);
            let schema = Ref::from_schema_name(named.name).into();
            responses.response("200", good.content("application/json", json(schema)).build())
        }
        Gives::Document => {
            let schema = RefOr::T(Schema::Object(ObjectBuilder::new().build()));
            responses.response("200", good.content("application/json", json(schema)).build())
        }
        Gives::Text(kind) => {
            let schema = ObjectBuilder::new().schema_type(Type::String).build();
            responses.response("200", good.content(kind, json(schema.into())).build())
        }
    };
    let (kind, name) =
        if ours { ("application/problem+json", Problem::name()) } else { ("application/json", Fault::name()) };
    let refusals: &[(&str, &str)] = match (ours, has_body) {
        (false, _) => &[("400", "Why it is not done")],
        (true, false) => &[("400", "The request makes no sense")],
        (true, true) => &[
            ("400", "The request makes no sense"),
            ("404", "There is no device of that name"),
            ("409", "It would make sense at another time"),
            ("500", "The host does not let us"),
            ("501", "Not supported yet"),
        ],
    };
    for (status, text) in refusals {
        let schema = Ref::from_schema_name(name.clone()).into();
        responses =
            responses.response(*status, ResponseBuilder::new().description(*text).content(kind, json(schema)).build());
    }
    built.responses(responses.build())
}

mod tests {
    use super::*;
    use serde_json::Value;

    /// With `WRITE_OPENAPI=1` it is made so.
    #[test]
    fn the_document_in_docs_is_that_of_the_types() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        if std::env::var_os("WRITE_OPENAPI").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap();
        assert!(kept == document(), "run WRITE_OPENAPI=1 cargo test --lib openapi, and look at the difference");
    }

    #[test]
    fn the_document_is_whole() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        assert_eq!(document["openapi"].as_str().map(|version| &version[..3]), Some("3.1"));
        assert!(document["paths"].as_object().unwrap().len() > 25);
        // Each method of a path is there, not only the last one.
        for method in ["get", "put", "patch"] {
            assert!(document["paths"]["/machine-config"][method].is_object(), "{method}");
        }
        // Every reference leads somewhere.
        fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
            match value {
                Value::Object(fields) => {
                    found.extend(fields.get("$ref").and_then(Value::as_str));
                    fields.values().for_each(|value| references(value, found));
                }
                Value::Array(values) => values.iter().for_each(|value| references(value, found)),
                _ => {}
            }
        }
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 30);
        for reference in found {
            let name = reference.strip_prefix("#/components/schemas/").expect(reference);
            assert!(document["components"]["schemas"][name].is_object(), "{reference}");
        }
    }
}
