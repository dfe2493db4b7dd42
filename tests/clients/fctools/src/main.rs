//! Drives a VM through the crate fctools: describes it, starts it, talks to its console, pauses, resumes and stops it.
//! Ends with a panic at the first thing that is not as that crate's users would have it.
//!
//! usage: fctools-client FIRECRACKER SOCKET KERNEL INITRD ROOTFS DATA TAP
//! DATA is a disk the guest writes to. TAP's other side is 172.30.9.1.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, Drive, DriveCacheType, EntropyDevice, MachineConfiguration, MetricsSystem, NetworkInterface,
    RateLimiter, TokenBucket, UpdateDrive,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::process_handle::ProcessHandlePipes;
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use futures_util::{AsyncReadExt, AsyncWriteExt};

/// For anything that a guest does on an emulated KVM on a busy machine.
const LIMIT: Duration = Duration::from_secs(400);

type Pipes = ProcessHandlePipes<fctools::runtime::tokio::TokioRuntimeChild>;

/// The guest's serial console: the streams of the VM's process.
struct Console {
    pipes: Pipes,
    said: String,
}

impl Console {
    async fn wait_for(&mut self, what: &str) {
        let mut chunk = [0; 4096];
        while !self.said.contains(what) {
            let read = tokio::time::timeout(LIMIT, self.pipes.stdout.read(&mut chunk)).await;
            let count = read.unwrap_or_else(|_| panic!("no '{what}' on the console")).unwrap();
            assert_ne!(count, 0, "the console has ended without '{what}'");
            let text = String::from_utf8_lossy(&chunk[..count]);
            print!("{text}");
            self.said.push_str(&text);
        }
    }

    /// Types a line at the guest's shell.
    async fn type_line(&mut self, line: &str) {
        self.pipes.stdin.write_all(line.as_bytes()).await.unwrap();
        self.pipes.stdin.write_all(b"\n").await.unwrap();
        self.pipes.stdin.flush().await.unwrap();
    }
}

fn drive(id: &str, root: bool, block: Resource) -> Drive {
    Drive {
        drive_id: id.into(),
        is_root_device: root,
        cache_type: (!root).then_some(DriveCacheType::Writeback),
        partuuid: None,
        is_read_only: Some(root),
        block: Some(block),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    }
}

async fn run(paths: [PathBuf; 6], tap: String) {
    let [firecracker, socket, kernel, initrd, rootfs, data] = paths;
    let mut resources = ResourceSystem::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let metrics = socket.with_file_name("metrics");
    let mut resource = |path: &Path, kind| resources.create_resource(path, kind).unwrap();
    let metrics_file = resource(&metrics, ResourceType::Created(CreatedResourceType::File));
    let mut file = |path: &Path| resource(path, ResourceType::Moved(MovedResourceType::HardLinkedOrCopied));
    let bucket = |size| TokenBucket { size, one_time_burst: None, refill_time: 100 };
    let description = VmConfigurationData {
        boot_source: BootSource {
            kernel_image: file(&kernel),
            boot_args: Some("console=ttyS0 reboot=k panic=1 quiet tranche.ip=172.30.9.2/24".into()),
            initrd: Some(file(&initrd)),
        },
        drives: vec![drive("rootfs", true, file(&rootfs)), drive("data", false, file(&data))],
        pmem_devices: Vec::new(),
        machine_configuration: MachineConfiguration {
            vcpu_count: 2,
            mem_size_mib: 256,
            smt: None,
            track_dirty_pages: Some(true),
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".into(),
            host_dev_name: tap,
            guest_mac: Some("06:00:AC:1E:09:02".into()),
            rx_rate_limiter: Some(RateLimiter { bandwidth: bucket(100 << 20), ops: bucket(100_000) }),
            tx_rate_limiter: None,
        }],
        balloon_device: None,
        vsock_device: None,
        logger_system: None,
        metrics_system: Some(MetricsSystem { metrics: metrics_file }),
        memory_hotplug_configuration: None,
        mmds_configuration: None,
        entropy_device: Some(EntropyDevice::default()),
    };
    let executor = UnrestrictedVmmExecutor::new(VmmArguments::new(VmmApiSocket::Enabled(socket.clone())))
        .id(VmmId::new("fctools").unwrap());
    let nowhere = |name| PathBuf::from("/nowhere").join(name);
    let installation = VmmInstallation::new(firecracker, nowhere("jailer"), nowhere("snapshot-editor"));
    let configuration = VmConfiguration::New { init_method: InitMethod::ViaApiCalls, data: description };
    let mut vm = Vm::prepare(executor, resources, installation, configuration).await.unwrap();
    assert_eq!(vm.get_state(), VmState::NotStarted);
    vm.start(LIMIT).await.unwrap();
    assert_eq!(vm.get_state(), VmState::Running);

    let info = vm.get_info().await.unwrap();
    assert_eq!((info.id.as_str(), info.is_paused, info.app_name.as_str()), ("fctools", false, "Firecracker"));
    assert_eq!(vm.get_firecracker_version().await.unwrap(), info.vmm_version);
    let machine = vm.get_machine_configuration().await.unwrap();
    assert_eq!((machine.vcpu_count, machine.mem_size_mib, machine.track_dirty_pages), (2, 256, Some(true)));

    // What is typed is echoed; `$` keeps the echo from being taken for the answer.
    let mut console = Console { pipes: vm.take_pipes().unwrap(), said: String::new() };
    console.wait_for("root@tranche").await;
    console.type_line("echo cpus=$(nproc) ip=$(ping -c 1 -W 60 172.30.9.1 > /run/ping && echo reached)").await;
    console.wait_for("cpus=2 ip=reached").await;

    vm.pause().await.unwrap();
    assert_eq!(vm.get_state(), VmState::Paused);
    assert!(vm.get_info().await.unwrap().is_paused);
    console.type_line("echo awake=$((20 + 22))").await;
    vm.resume().await.unwrap();
    assert!(!vm.get_info().await.unwrap().is_paused);
    console.wait_for("awake=42").await;

    let slower = RateLimiter { bandwidth: bucket(50 << 20), ops: bucket(50_000) };
    vm.update_drive(UpdateDrive { drive_id: "data".into(), block: None, rate_limiter: Some(slower) }).await.unwrap();
    console.type_line("echo from-the-guest | dd of=$(disk data) conv=fsync && echo written=$((1 + 1))").await;
    console.wait_for("written=2").await;
    let written = std::fs::read(data).unwrap();
    assert!(written.starts_with(b"from-the-guest\n"), "what the guest has written is not on its disk");

    vm.flush_metrics().await.unwrap();
    let lines = std::fs::read_to_string(metrics).unwrap();
    assert!(lines.lines().count() >= 2 && lines.ends_with("}\n"), "no metrics: {lines}");

    let button = VmShutdownAction { method: VmShutdownMethod::CtrlAltDel, timeout: Some(LIMIT), graceful: true };
    let outcome = vm.shutdown([button]).await.unwrap();
    assert!(outcome.is_fully_graceful(), "{outcome:?}");
    assert_eq!(vm.get_state(), VmState::Exited);
    console.wait_for("Vmm is stopping").await;
    console.wait_for("Firecracker exiting successfully").await;
    vm.cleanup().await.unwrap();
    assert!(!socket.exists());
    println!("all is well");
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [paths @ .., tap] = &args[..] else { panic!("no arguments") };
    let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    let paths = paths.try_into().expect("FIRECRACKER SOCKET KERNEL INITRD ROOTFS DATA TAP");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(paths, tap.clone()));
}
