//! The VM generation ID: another one for each life of a guest.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;

use crate::support::tranche;
use crate::vm::{LIMIT, Vm, firecracker, vmm};

/// Where it lies in guest memory, and so in its file.
const PLACE: u64 = 0xf_ffe0;

fn id_in(memory: &Path) -> [u8; 16] {
    let mut id = [0; 16];
    File::open(memory).unwrap().read_exact_at(&mut id, PLACE).unwrap();
    id
}

/// Saves a VM, which goes on, and looks at the ID that it had.
fn id_of(vm: &Vm, dir: &Path) -> [u8; 16] {
    let answer = vm.ask("PUT", "/v2/vm/snapshot", Some(&json!({ "path": dir }).to_string()));
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    id_in(&dir.join("memory"))
}

#[test]
fn every_life_has_another() {
    let vm = Vm::start(vmm());
    vm.boot_hello("end=echo");
    let (first, again) = (vm.path("first"), vm.path("again"));
    let mut seen = vec![[0; 16], id_of(&vm, &first)];
    assert_eq!(id_of(&vm, &again), seen[1], "it is the same as long as it lives");
    // Pressing the reset button makes new memory of it, and so a new ID.
    vm.put("/v2/vm/power", r#"{"power":"reset"}"#);
    seen.push(id_of(&vm, &vm.path("reset")));
    for name in ["one", "two"] {
        let mut restore = tranche();
        restore.arg("restore").arg(&first).arg("--paused");
        let restored = Vm::start(restore);
        seen.push(id_of(&restored, &vm.path(name)));
        restored.kill().expect_code(5);
    }
    vm.kill().expect_code(5);
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 5);
}

#[test]
fn loading_two_files_counts_as_a_life() {
    let vm = Vm::start(firecracker());
    vm.boot_hello("end=echo");
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    let save = |vm: &Vm, memory: &Path, kind: &str| {
        let body = json!({ "snapshot_path": vm.path("state"), "mem_file_path": memory, "snapshot_type": kind });
        vm.put("/snapshot/create", &body.to_string());
        id_in(memory)
    };
    let memory = vm.path("memory");
    let first = save(&vm, &memory, "Full");
    let second = Vm::start(firecracker());
    let load = json!({
        "snapshot_path": vm.path("state"),
        "mem_backend": { "backend_type": "File", "backend_path": memory },
        "track_dirty_pages": true,
    });
    second.put("/snapshot/load", &load.to_string());
    // It is among what has been written since.
    let difference = save(&second, &second.path("difference"), "Diff");
    assert!(first != difference && difference != [0; 16]);
    assert_eq!(save(&second, &second.path("all"), "Full"), difference);
    drop(vm);
    second.running.signal(rustix::process::Signal::KILL);
    drop(second.running.wait(LIMIT));
}
