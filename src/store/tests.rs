use super::*;
use crate::config::{DiskConfig, VmConfig};
use proptest::prelude::*;
use std::time::Duration;

fn definition() -> Definition {
    let mut definition = Definition::parse(br#"{ "version": 1, "vm": { "kernel": "debian" } }"#).unwrap();
    definition.vm.disks = vec![
        DiskConfig { root: true, ..DiskConfig::from_arg("root.img").unwrap() },
        DiskConfig::from_arg("/data.img").unwrap(),
        DiskConfig::from_arg("more.img,id=disk1").unwrap(),
    ];
    definition.settle(Path::new("/base")).unwrap();
    definition
}

struct Place {
    _dir: tempfile::TempDir,
    store: Store,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::in_dirs(&dir.path().join("state"), &dir.path().join("run"));
    Place { _dir: dir, store }
}

fn names(store: &Store) -> Vec<String> {
    store.all().unwrap().iter().map(|vm| vm.name().to_owned()).collect()
}

#[test]
fn definitions_are_settled_and_come_back() {
    let definition = definition();
    let VmConfig { kernel, disks, .. } = &definition.vm;
    assert_eq!(kernel, Path::new("debian"), "an imported kernel's name is no path");
    let disks: Vec<_> = disks.iter().map(|disk| (disk.path.to_str().unwrap(), disk.id.as_deref().unwrap())).collect();
    assert_eq!(disks, [("/base/root.img", "root"), ("/data.img", "disk2"), ("/base/more.img", "disk1")]);
    definition.validate().unwrap();
    assert_eq!(Definition::parse(&definition.to_json()).unwrap(), definition);
}

#[test]
fn the_example_of_the_documentation_is_one() {
    let page = include_str!("../../docs/vms.md");
    let example = page.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let mut definition = Definition::parse(example.as_bytes()).unwrap();
    definition.settle(Path::new("/base")).unwrap();
    definition.validate().unwrap();
    assert_eq!(definition.vm.disks[1].path, Path::new("/base/logs.qcow2"));
}

#[test]
fn definitions_that_make_no_sense_are_refused() {
    let parse = |text: &str| {
        let mut definition = Definition::parse(text.as_bytes()).map_err(|error| error.to_string())?;
        definition.settle(Path::new("/base")).unwrap();
        definition.validate().map_err(|error| error.to_string())
    };
    assert_eq!(parse(r#"{"version":1,"vm":{"kernel":"/k","cpus":2,"memory":"1G","disks":[{"path":"d"}]}}"#), Ok(()));
    for (text, error) in [
        ("", "EOF"),
        (r#"{"version":2,"vm":{},"later":1}"#, "version 2, this release knows 1"),
        (r#"{"version":1,"vm":{}}"#, "missing field `kernel`"),
        (r#"{"version":1,"vm":{"kernel":"/k","colour":1}}"#, "unknown field `colour`"),
        (r#"{"version":1,"vm":{"kernel":"/k"},"colour":1}"#, "unknown field `colour`"),
        (r#"{"version":1,"vm":{"kernel":"/k","cpus":0}}"#, "0 vCPUs are out of range"),
        (r#"{"version":1,"vm":{"kernel":"/k","memory":"1M"}}"#, "1M of memory is too little"),
        (r#"{"boot-source":{"kernel_image_path":"/k"}}"#, "a VM for Firecracker"),
    ] {
        let said = parse(text).unwrap_err();
        assert!(said.contains(error), "{text}: {said}");
    }
}

#[test]
fn vms_are_made_found_renamed_and_removed() {
    let Place { _dir, store } = place();
    assert_eq!(names(&store), [""; 0]);
    let vm = store.create("one", &definition()).unwrap();
    store.create("two", &definition()).unwrap();
    assert_eq!(names(&store), ["one", "two"]);
    assert_eq!(store.find("one").unwrap().definition().unwrap(), definition());
    assert!(matches!(store.create("one", &definition()), Err(StoreError::Exists(_))));
    assert!(matches!(store.rename(&vm, "two"), Err(StoreError::Exists(_))));
    store.rename(&vm, "three").unwrap();
    assert_eq!(names(&store), ["three", "two"]);
    assert!(matches!(vm.definition(), Err(StoreError::Unknown(_))));
    for name in ["", ".", "..", "a/b", "-x", ".new-x", "ä", &"x".repeat(LONGEST_NAME + 1)] {
        assert!(matches!(store.create(name, &definition()), Err(StoreError::Name(_))), "{name}");
        assert!(matches!(store.find(name), Err(StoreError::Unknown(_))), "{name}");
    }
    store.remove(&store.find("three").unwrap()).unwrap();
    assert_eq!(names(&store), ["two"]);
    assert_eq!(std::fs::read_dir(store.vms.dir()).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn what_runs_is_left_alone() {
    let Place { _dir, store } = place();
    let vm = store.create("one", &definition()).unwrap();
    assert_eq!(vm.state(), State::Stopped);
    let (mut running, started) = vm.run().unwrap();
    assert_eq!(started, definition());
    assert_eq!((vm.state(), vm.running_definition()), (State::Running, Some(definition())));
    assert!(matches!(vm.run(), Err(StoreError::Running(_))));
    assert!(matches!(store.remove(&vm), Err(StoreError::Running(_))));
    assert!(matches!(store.rename(&vm, "two"), Err(StoreError::Running(_))));
    // It may be given another definition, which the next start takes.
    let change = vm.change().unwrap();
    assert!(matches!(vm.change(), Err(StoreError::Busy(_))));
    let mut other = definition();
    other.vm.cpus = 3;
    vm.define(&change, &other).unwrap();
    other.vm.cpus = 0;
    assert!(matches!(vm.define(&change, &other), Err(StoreError::Definition { .. })));
    assert_eq!(vm.running_definition(), Some(definition()));
    assert!(vm.process().is_some() && !vm.wait_until_it_ends(Some(Duration::from_millis(20))));
    running.end(0, "the guest powered off".into());
    assert!(vm.is_locked(), "until its process is gone");
    drop(running);
    assert!(vm.process().is_none() && vm.wait_until_it_ends(None));
    assert_eq!((vm.state(), vm.running_definition()), (State::Stopped, None));
    assert_eq!(vm.definition().unwrap().vm.cpus, 3);

    let (mut running, _) = vm.run().unwrap();
    running.end(4, "the guest's kernel panicked".into());
    drop(running);
    assert_eq!(vm.state(), State::Failed("the guest's kernel panicked".into()));
    // A process that is killed says nothing more.
    drop(vm.run().unwrap());
    assert_eq!(vm.state(), State::Dead("its process was killed".into()));
}

proptest! {
    #[test]
    fn no_definition_panics(text in r#"(\{"version":1,"vm":\{"kernel":"k"(,"[a-z]{1,6}":[0-9\[\{"]{0,5})?.{0,30})|.{0,80}"#) {
        if let Ok(mut definition) = Definition::parse(text.as_bytes()) {
            let _ = definition.settle(Path::new("/"));
            let _ = definition.validate();
        }
    }
}
