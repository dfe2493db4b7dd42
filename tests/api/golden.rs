//! Snapshots that earlier releases have made go on. They are in `tests/golden`, see the README there.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::worker::Worker;
use crate::support::{Running, disk_with, tranche};
use crate::vm::{LIMIT, Vm, drive, firecracker};

const KIB: usize = 16;
const DISK: usize = 64 << 10;
/// What the guest was told before it was saved: with its disk in the snapshot it had written to that, too.
const BEFORE: &str = "wdzw";
const BEFORE_STORED: &str = "wbdzbw";
const PAGE: usize = 4096;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

#[test]
fn snapshots_of_earlier_releases_go_on() {
    if let Ok(wanted) = std::env::var("TRANCHE_WRITE_GOLDEN") {
        for (name, transport, stored) in [("pci", "pci", false), ("mmio", "mmio", false), ("pci-disk", "pci", true)] {
            if wanted == name {
                write(&golden().join("v1").join(name), transport, stored);
            }
        }
    }
    let mut count = 0;
    for release in fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for golden in fs::read_dir(&release).unwrap().map(|entry| entry.unwrap().path()) {
            println!("{}", golden.display());
            goes_on(&golden);
            count += 1;
        }
    }
    assert!(count >= 3, "only {count} snapshots");
}

fn goes_on(golden: &Path) {
    let files = tempfile::tempdir().unwrap();
    let dir = files.path().join("snap");
    unpack(golden, &dir);
    let verified = Running::start(tranche().args(["snapshot", "verify"]).arg(&dir)).wait(LIMIT).expect_code(0);
    assert_eq!(verified.errors, "");
    let made_elsewhere = take_to_this_vendor(&dir);
    if let Some(vendor) = made_elsewhere {
        // Not without that: it is refused, and by name.
        let untouched = files.path().join("untouched");
        unpack(golden, &untouched);
        let ended = Running::start(&mut restore(&untouched, files.path())).wait(LIMIT).expect_code(82);
        assert!(ended.errors.contains(&vendor), "{}", ended.errors);
    }

    let mut running = Running::start(&mut restore(&dir, files.path()));
    let mut worker = Worker::new(KIB, Worker::disk(DISK));
    // It was asked for its sum then, too.
    worker.recall(if dir.join("disks").exists() { BEFORE_STORED } else { BEFORE });
    worker.recall("s");
    worker.check(&mut running);
    for letters in ["w", "d", "zwd"] {
        worker.tell(&mut running, letters);
        worker.check(&mut running);
    }
    running.send("q");
    running.wait(LIMIT).expect_code(0);
}

fn restore(dir: &Path, files: &Path) -> Command {
    let mut command = tranche();
    command.arg("restore").arg(dir);
    if !dir.join("disks").exists() {
        let disk = disk_with(files, "disk", &Worker::disk(DISK));
        command.arg(format!("--override=disk.data={}", disk.display()));
    }
    command
}

/// The disk that a snapshot holds, packed as `disk.gz`, and where it is.
const STORED_DISK: &str = "disks/0.0.raw";

/// Pages of memory in `memory.gz`: the file's length, then for each page its number and its bytes.
fn unpack(golden: &Path, dir: &Path) {
    fs::create_dir(dir).unwrap();
    for name in ["manifest.json", "config.json", "state.json"] {
        fs::copy(golden.join(name), dir.join(name)).unwrap();
    }
    let mut pages = Vec::new();
    GzDecoder::new(File::open(golden.join("memory.gz")).unwrap()).read_to_end(&mut pages).unwrap();
    let (len, pages) = pages.split_at(8);
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let memory = File::create(dir.join("memory")).unwrap();
    memory.set_len(number(len)).unwrap();
    for page in pages.chunks(8 + PAGE) {
        memory.write_all_at(&page[8..], number(&page[..8]) * PAGE as u64).unwrap();
    }
    if let Ok(packed) = File::open(golden.join("disk.gz")) {
        fs::create_dir(dir.join("disks")).unwrap();
        io::copy(&mut GzDecoder::new(packed), &mut File::create(dir.join(STORED_DISK)).unwrap()).unwrap();
    }
}

fn pack(dir: &Path, golden: &Path) {
    let memory = fs::read(dir.join("memory")).unwrap();
    let mut packed = GzEncoder::new(File::create(golden.join("memory.gz")).unwrap(), Compression::best());
    packed.write_all(&(memory.len() as u64).to_le_bytes()).unwrap();
    for (number, page) in (0u64..).zip(memory.chunks(PAGE)).filter(|(_, page)| page.iter().any(|&byte| byte != 0)) {
        packed.write_all(&number.to_le_bytes()).unwrap();
        packed.write_all(page).unwrap();
    }
    packed.finish().unwrap();
    if let Ok(mut disk) = File::open(dir.join(STORED_DISK)) {
        let mut packed = GzEncoder::new(File::create(golden.join("disk.gz")).unwrap(), Compression::best());
        io::copy(&mut disk, &mut packed).unwrap();
        packed.finish().unwrap();
    }
}

// --- A CPU's vendor is the one thing that a snapshot cannot leave behind. What is saved of this guest is the same on
// --- every other, so the test renames it.

/// Registers of a saved CPUID entry: function, index, flags, EAX, EBX, ECX, EDX.
type Entry = [u32; 7];

fn entry(hex: &Value) -> Entry {
    let mut digits = hex.as_str().unwrap().to_owned();
    digits.extend(std::iter::repeat_n('0', 56 - digits.len().min(56)));
    std::array::from_fn(|i| u32::from_str_radix(&digits[8 * i..][..8], 16).unwrap().swap_bytes())
}

fn hex(entry: Entry) -> Value {
    entry.iter().map(|register| format!("{:08x}", register.swap_bytes())).collect::<String>().into()
}

/// Makes a snapshot one of this host's vendor; returns of which it was, if another.
fn take_to_this_vendor(dir: &Path) -> Option<String> {
    let here = std::arch::x86_64::__cpuid(0);
    let mut state = read(&dir.join("state.json"));
    let mut manifest = read(&dir.join("manifest.json"));
    let name: Vec<u8> = [here.ebx, here.edx, here.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    let name = String::from_utf8(name).unwrap();
    let was = manifest["cpu"]["vendor"].as_str().unwrap().to_owned();
    if was == name {
        return None;
    }
    for cpuid in cpuids(&mut state) {
        let [function, index, flags, eax, ..] = entry(cpuid);
        if function == 0 || function == 0x8000_0000 {
            *cpuid = hex([function, index, flags, eax, here.ebx, here.ecx, here.edx]);
        }
    }
    manifest["cpu"]["vendor"] = name.into();
    write_part(dir, "state.json", &state, &mut manifest);
    Some(was)
}

fn cpuids(state: &mut Value) -> impl Iterator<Item = &mut Value> {
    let vcpus = state["machine"]["vcpus"].as_array_mut().unwrap();
    vcpus.iter_mut().flat_map(|vcpu| vcpu["state"]["cpuid"].as_array_mut().unwrap())
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Writes a document, and its checksum into the manifest.
fn write_part(dir: &Path, name: &str, document: &Value, manifest: &mut Value) {
    let text = |document| serde_json::to_string_pretty(document).unwrap() + "\n";
    let written = text(document);
    let part = manifest["parts"].as_array_mut().unwrap().iter_mut().find(|part| part["name"] == name).unwrap();
    part["size"] = written.len().into();
    part["sha256"] = Sha256::digest(&written).iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
    fs::write(dir.join(name), written).unwrap();
    fs::write(dir.join("manifest.json"), text(manifest)).unwrap();
}

// --- How they are made.

/// Saves a VM whose CPU is no more than every one of the last fifteen years.
fn write(golden: &Path, transport: &str, stored: bool) {
    let mut command = firecracker();
    if transport == "pci" {
        command.arg("--enable-pci");
    }
    let mut vm = Vm::start(command);
    vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":32}"#);
    let disk = disk_with(vm.dir.path(), "disk", &Worker::disk(DISK));
    vm.put("/drives/data", &drive("data", false, &disk));
    vm.put("/entropy", "{}");
    vm.put("/cpu-config", &plain_cpu().to_string());
    vm.put_kernel("worker", &format!("kib={KIB} disk=1 transport={transport}"));
    vm.act("InstanceStart");
    vm.running.output.wait_for("ready\n", LIMIT);
    let mut worker = Worker::new(KIB, Worker::disk(DISK));
    worker.tell(&mut vm.running, if stored { BEFORE_STORED } else { BEFORE });
    worker.check(&mut vm.running);
    let dir = vm.path("snap");
    let answer =
        vm.ask("PUT", "/v2/vm/snapshot", Some(&json!({ "path": dir, "stop": true, "disks": stored }).to_string()));
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));

    let mut state = read(&dir.join("state.json"));
    for vcpu in state["machine"]["vcpus"].as_array_mut().unwrap() {
        leave_the_host_behind(&mut vcpu["state"]);
    }
    keep_ports_open(&mut state["machine"]["vcpus"][0]["state"]);
    let mut config = read(&dir.join("config.json"));
    for document in [&mut state, &mut config] {
        rename_files(document);
    }
    let mut manifest = read(&dir.join("manifest.json"));
    write_part(&dir, "state.json", &state, &mut manifest);
    write_part(&dir, "config.json", &config, &mut manifest);
    fs::create_dir_all(golden).unwrap();
    for name in ["manifest.json", "config.json", "state.json"] {
        fs::copy(dir.join(name), golden.join(name)).unwrap();
    }
    pack(&dir, golden);
}

/// CPUID without anything that only some CPUs have, and with the fewest address bits.
fn plain_cpu() -> Value {
    let bits = |value: u32| format!("0b{value:032b}");
    let only = |mask: u32| -> String {
        let bit = |bit: u32| if mask >> bit & 1 == 0 { '0' } else { 'x' };
        std::iter::once("0b".to_owned()).chain((0..32).rev().map(|i| bit(i).to_string())).collect()
    };
    let leaf = |leaf: &str, subleaf: &str, flags: u32, registers: &[(&str, String)]| {
        let modifiers: Vec<_> =
            registers.iter().map(|(register, bitmap)| json!({ "register": register, "bitmap": bitmap })).collect();
        json!({ "leaf": leaf, "subleaf": subleaf, "flags": flags, "modifiers": modifiers })
    };
    json!({ "cpuid_modifiers": [
        // Up to SSE2 and CMPXCHG16B; x2APIC, TSC deadline and a hypervisor are KVM's.
        leaf("0x1", "0x0", 0, &[("ecx", only(0x8120_2000)), ("edx", only(0x1783_fbfd))]),
        leaf("0x7", "0x0", 1, &[("ebx", bits(0)), ("ecx", bits(0)), ("edx", bits(0))]),
        leaf("0x7", "0x1", 1, &[("eax", bits(0))]),
        leaf("0xd", "0x0", 1, &[("eax", bits(0)), ("edx", bits(0))]),
        leaf("0xd", "0x1", 1, &[("eax", bits(0)), ("ecx", bits(0)), ("edx", bits(0))]),
        leaf("0x80000001", "0x0", 0, &[("ecx", only(1)), ("edx", only(0x2010_0800))]),
        leaf("0x80000008", "0x0", 0, &[("eax", bits(0x3026)), ("ebx", bits(0))]),
    ]})
}

/// MSRs that every CPU and every KVM has: TSC, SYSENTER, PAT, MTRRs, SYSCALL, and the timer's deadline.
const PLAIN_MSRS: [std::ops::RangeInclusive<u64>; 8] = [
    0x10..=0x10,
    0x174..=0x176,
    0x1a0..=0x1a0,
    0x200..=0x20f,
    0x250..=0x2ff,
    0x6e0..=0x6e0,
    0xc000_0081..=0xc000_0084,
    0xc000_0102..=0xc000_0102,
];

/// Gives files that are named by their path another one, which no machine has.
fn rename_files(document: &mut Value) {
    match document {
        Value::String(text) if text.starts_with('/') => *text = "/golden/file".into(),
        Value::Array(values) => values.iter_mut().for_each(rename_files),
        Value::Object(values) => values.values_mut().for_each(rename_files),
        _ => {}
    }
}

/// Takes out of a vCPU's state what not every host could take up, and this guest does not use.
fn leave_the_host_behind(vcpu: &mut Value) {
    // How fast its time stamp counter went: not every CPU can have it go at another pace.
    vcpu["tsc_khz"] = Value::Null;
    vcpu["msrs"].as_array_mut().unwrap().retain(|msr| {
        let index = msr[0].as_u64().unwrap();
        PLAIN_MSRS.iter().any(|plain| plain.contains(&index))
    });
    // The part of the FPU's state that every CPU has, and the header.
    let xsave = vcpu["xsave"].as_str().unwrap();
    vcpu["xsave"] = xsave[..xsave.len().min(2 * 576)].into();
}

/// The guest has asked for all ports in ring 3 (IOPL 3), which not every KVM remembers.
fn keep_ports_open(vcpu: &mut Value) {
    const RFLAGS: usize = 17 * 8;
    let regs = vcpu["regs"].as_str().unwrap();
    let mut digits = format!("{regs:0<width$}", width = 2 * (RFLAGS + 8));
    let at = 2 * (RFLAGS + 1)..2 * (RFLAGS + 2);
    let flags = u8::from_str_radix(&digits[at.clone()], 16).unwrap() | 0x30;
    digits.replace_range(at, &format!("{flags:02x}"));
    vcpu["regs"] = digits.into();
}
