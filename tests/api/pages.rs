//! VMs whose memory another process gives, page by page: the back end `Uffd` of `/snapshot/load`.

#![allow(unsafe_code, reason = "the handler's ioctl")]

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use crate::support::worker::Worker;
use crate::support::{Running, disk_with, not_tested};
use crate::vm::{LIMIT, Vm, drive, firecracker, logging_firecracker};

const SOCKET: &str = "TRANCHE_PAGES_SOCKET";
const MEMORY: &str = "TRANCHE_PAGES_MEMORY";

/// The handler, when the tests below start this program as one; else nothing.
#[test]
fn handler() {
    let (Some(socket), Some(memory)) = (std::env::var_os(SOCKET), std::env::var_os(MEMORY)) else { return };
    let listener = UnixListener::bind(socket).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let (mappings, faults) = receive(&stream);
    let memory = File::open(memory).unwrap();
    let mut stream_open = true;
    loop {
        // Until the VM hangs up.
        let mut fds = [PollFd::new(&faults, PollFlags::IN), PollFd::new(&stream, PollFlags::RDHUP)];
        poll(&mut fds, None).unwrap();
        stream_open &= fds[1].revents().is_empty();
        if !stream_open {
            return;
        }
        // `struct uffd_msg`: the event first, the address at 16.
        let mut message = [0; 32];
        if let Ok(32) = (&File::from(faults.try_clone().unwrap())).read(&mut message) {
            assert_eq!(message[0], 0x12, "only page faults are told");
            let address = u64::from_ne_bytes(message[16..24].try_into().unwrap()) & !0xfff;
            give(&faults, &mappings, &memory, address);
        }
    }
}

fn receive(stream: &UnixStream) -> (Vec<Value>, OwnedFd) {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    (serde_json::from_slice(&text[..got.bytes]).unwrap(), descriptor.unwrap())
}

fn give(faults: &OwnedFd, mappings: &[Value], memory: &File, address: u64) {
    /// `struct uffdio_copy`.
    #[repr(C)]
    struct Copy {
        to: u64,
        from: u64,
        len: u64,
        mode: u64,
        copied: i64,
    }
    const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
    let number = |mapping: &Value, key: &str| mapping[key].as_u64().unwrap();
    let mapping = mappings.iter().find(|mapping| {
        let start = number(mapping, "base_host_virt_addr");
        (start..start + number(mapping, "size")).contains(&address)
    });
    let mapping = mapping.expect("a fault in memory that was told of");
    assert_eq!((number(mapping, "page_size"), number(mapping, "page_size_kib")), (4096, 4096));
    let mut page = [0u8; 4096];
    let at = address - number(mapping, "base_host_virt_addr") + number(mapping, "offset");
    memory.read_exact_at(&mut page, at).unwrap();
    let mut copy = Copy { to: address, from: page.as_ptr() as u64, len: 4096, mode: 0, copied: 0 };
    // SAFETY: the argument is as the kernel declares it, and the page outlives the call.
    let done = unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
    let error = std::io::Error::last_os_error();
    // Two vCPUs may have asked for it.
    assert!(done == 0 || error.raw_os_error() == Some(libc::EEXIST), "{error}");
}

fn start_handler(socket: &Path, memory: &Path) -> Running {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "pages::handler", "--nocapture"]).env(SOCKET, socket).env(MEMORY, memory);
    let handler = Running::start(&mut command);
    while !socket.exists() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    handler
}

fn load(state: &Path, socket: &Path) -> String {
    let backend = json!({ "backend_type": "Uffd", "backend_path": socket });
    json!({ "snapshot_path": state, "mem_backend": backend, "track_dirty_pages": true, "resume_vm": true }).to_string()
}

#[test]
fn memory_comes_page_by_page_from_another_process() {
    if !rustix::process::geteuid().is_root() {
        return not_tested("memory by userfaultfd: only root can");
    }
    let files = tempfile::tempdir().unwrap();
    let path = |name: &str| files.path().join(name);
    let disk = disk_with(files.path(), "disk", &Worker::disk(1 << 20));
    let mut first = Vm::start(firecracker());
    first.put("/drives/data", &drive("data", false, &disk));
    first.put_kernel("worker", "kib=4096 disk=1 transport=mmio");
    first.act("InstanceStart");
    first.running.output.wait_for("ready\n", LIMIT);
    let mut worker = Worker::new(4096, Worker::disk(1 << 20));
    worker.tell(&mut first.running, "wdzw");
    worker.check(&mut first.running);
    first.patch("/vm", r#"{"state":"Paused"}"#);
    let (state, memory, socket) = (path("state"), path("memory"), path("pages.sock"));
    let create = |memory: &Path, kind: &str| {
        json!({ "snapshot_path": path("state"), "mem_file_path": memory, "snapshot_type": kind }).to_string()
    };
    first.put("/snapshot/create", &create(&memory, "Full"));
    drop(first.kill());

    // Nobody is there.
    let alone = Vm::start(firecracker());
    alone.expect_fault("PUT", "/snapshot/load", &load(&state, &socket), "cannot reach who gives the pages of memory");
    alone.running.wait(LIMIT).expect_code(1);

    let handler = start_handler(&socket, &memory);
    let mut second = Vm::start(firecracker());
    second.put("/snapshot/load", &load(&state, &socket));
    // Before it has looked at most of it: what is saved of it is all of it.
    second.patch("/vm", r#"{"state":"Paused"}"#);
    second.put("/snapshot/create", &create(&path("again"), "Full"));
    second.patch("/vm", r#"{"state":"Resumed"}"#);
    worker.check(&mut second.running);
    let mut twin = worker.clone();
    worker.tell(&mut second.running, "dwz");
    worker.check(&mut second.running);
    second.patch("/vm", r#"{"state":"Paused"}"#);
    second.put("/snapshot/create", &create(&path("again"), "Diff"));
    drop(second.kill());
    handler.wait(LIMIT).expect_code(0);

    // A handler that ends takes the VM with it: nobody has the pages that are still to come.
    let handler = start_handler(&socket, &path("again"));
    let mut third = Vm::start(logging_firecracker());
    third.put("/snapshot/load", &load(&state, &socket));
    // That snapshot was made after these.
    twin.recall("dwzs");
    twin.check(&mut third.running);
    handler.signal(rustix::process::Signal::KILL);
    let ended = third.running.wait(LIMIT).expect_code(1);
    assert!(ended.output.contains("the process that gave the guest's memory has ended"), "{}", ended.output);
}
