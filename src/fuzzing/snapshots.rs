//! Snapshots that anybody may have written, or changed.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::input::Input;
use super::memory_files::empty;
use crate::backend::host::Peer;
use crate::backend::{HostFile, HostFiles, OpenDirectly};
use crate::machine::{Machine, Origin, Parts, SaveError, SavedMemory, SerialSetup, State};
use crate::observe::Timeline;
use crate::platform::chips::Clock;
use crate::platform::serial::SerialOutput;
use crate::snapshot::{Folder, Snapshot};

/// Bits of the first byte of an input.
pub mod bits {
    /// Which document the rest is.
    pub const DOCUMENT: u8 = 3;
    /// The others are those of a VM with PCI.
    pub const PCI: u8 = 4;
    /// The manifest has the checksum of what it is.
    pub const MENDED: u8 = 8;
}

pub const MANIFEST: u8 = 0;
pub const CONFIG: u8 = 1;
pub const STATE: u8 = 2;
/// The file of a state, of a snapshot in two files.
pub const FILE: u8 = 3;

const NAMES: [&str; 4] = ["manifest.json", "config.json", "state.json", "file"];
const MEMORY: &str = "memory";
const MEMORY_SIZE: u64 = 32 << 20;
const DISK_SIZE: u64 = 64 << 10;

/// What a release has saved: manifest, configuration, state.
const PCI: [&str; 3] = [
    include_str!("../../tests/golden/v1/pci/manifest.json"),
    include_str!("../../tests/golden/v1/pci/config.json"),
    include_str!("../../tests/golden/v1/pci/state.json"),
];
const MMIO: [&str; 3] = [
    include_str!("../../tests/golden/v1/mmio/manifest.json"),
    include_str!("../../tests/golden/v1/mmio/config.json"),
    include_str!("../../tests/golden/v1/mmio/state.json"),
];

/// A good document, as short as it can be said.
pub fn document(pci: bool, which: u8) -> Vec<u8> {
    let texts = if pci { PCI } else { MMIO };
    let parse = |text: &str| -> Value { serde_json::from_str(text).expect("JSON") };
    let short = |value: &Value| serde_json::to_vec(value).expect("JSON");
    match which {
        MANIFEST => {
            let mut manifest = parse(texts[0]);
            for part in [CONFIG, STATE] {
                set_part(&mut manifest, NAMES[usize::from(part)], &document(pci, part));
            }
            // Its memory is all zeroes here.
            set_part(&mut manifest, MEMORY, &[]);
            part_mut(&mut manifest, MEMORY)["size"] = MEMORY_SIZE.into();
            short(&manifest)
        }
        CONFIG | STATE => short(&parse(texts[usize::from(which)])),
        _ => {
            let (config, state) = (parse(texts[1]), parse(texts[2]));
            let creator = "tranche 0.1.0";
            short(
                &json!({ "format": "tranche-snapshot-file", "version": 1, "creator": creator, "config": config, "state": state }),
            )
        }
    }
}

fn part_mut<'a>(manifest: &'a mut Value, name: &str) -> &'a mut Value {
    let parts = manifest["parts"].as_array_mut().expect("a list");
    parts.iter_mut().find(|part| part["name"] == name).expect("it is one of them")
}

fn set_part(manifest: &mut Value, name: &str, text: &[u8]) {
    let part = part_mut(manifest, name);
    part["size"] = text.len().into();
    part["sha256"] = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
}

/// Has a VM go on from a snapshot one of whose documents is the input: a byte of [`bits`], then its text.
pub fn snapshots(input: &[u8]) {
    let _ = restore(input);
}

/// Returns whether the snapshot could be read and, where there is KVM, whether a VM could be made of it.
pub fn restore(input: &[u8]) -> Option<Result<(), String>> {
    let mut input = Input(input);
    let bits = input.u8()?;
    let (pci, which, text) = (bits & bits::PCI != 0, bits & bits::DOCUMENT, input.0);
    let dir = Scratch::new();
    let write = |name: &str, text: &[u8]| fs::write(dir.0.join(name), text).expect("room for a document");
    for other in (MANIFEST..FILE).filter(|&other| other != which) {
        write(NAMES[usize::from(other)], &document(pci, other));
    }
    let name = NAMES[usize::from(which)];
    write(name, text);
    if bits & bits::MENDED != 0 && matches!(which, CONFIG | STATE) {
        let mut manifest: Value = serde_json::from_slice(&document(pci, MANIFEST)).expect("JSON");
        set_part(&mut manifest, name, text);
        write(NAMES[0], &serde_json::to_vec(&manifest).expect("JSON"));
    }
    let memory = dir.0.join(MEMORY);
    File::create(&memory).and_then(|file| file.set_len(MEMORY_SIZE)).expect("room for a file with holes");

    let opened = match which {
        FILE => Snapshot::open_files(&dir.0.join(name), &memory, &OpenDirectly),
        _ => {
            Folder::open(&dir.0, &OpenDirectly).and_then(|folder| folder.verify(&OpenDirectly).map(|_| folder.snapshot))
        }
    };
    let snapshot = match opened {
        Ok(snapshot) => snapshot,
        Err(error) => {
            assert!(error.hint().is_some());
            // A manifest may say anything of the others.
            assert!(which == MANIFEST || error.to_string().contains(name), "{error}");
            return Some(Err(with_cause(&error)));
        }
    };
    let host = Host;
    if host.open(&HostFile::Kvm).is_err() {
        return Some(Ok(()));
    }
    Some(build(snapshot, &host))
}

fn with_cause(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Makes a VM of it, and saves that again.
fn build(snapshot: Snapshot, host: &Host) -> Result<(), String> {
    let Snapshot { config, state, memory, .. } = snapshot;
    let origin =
        Origin::Saved { state: Box::new(state.machine), memory: SavedMemory::File(memory), clock: Clock::Continue };
    let parts = Parts::of_saved(&config, origin, SerialSetup(SerialOutput::Null), "vcpu", host);
    let machine =
        parts.and_then(|parts| Machine::build(parts, host, &Timeline::from(std::time::Instant::now()).into()));
    let mut machine = machine.map_err(|error| with_cause(&error))?;
    assert!(matches!(machine.state(), State::Paused { .. }));
    machine.at_rest(|rest| rest.state()).map(drop).map_err(|error: SaveError| with_cause(&error))
}

/// Has KVM, and a disk under every name; no networks.
struct Host;

impl HostFiles for Host {
    fn open(&self, file: &HostFile) -> io::Result<File> {
        match file {
            HostFile::Kvm => OpenDirectly.open(file),
            HostFile::Disk { .. } => {
                let disk = empty();
                disk.set_len(DISK_SIZE)?;
                Ok(disk)
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn connect(&self, _path: &Path) -> io::Result<Peer> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn listen(&self, _path: &Path) -> io::Result<UnixListener> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A directory of its own for each run.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("tranche-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a scratch directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
