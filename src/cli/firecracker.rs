//! What the program is when it is called `firecracker`: its command line, configuration file, logs and exit codes.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;

use super::api_socket::{ApiSocket, RunningApi};
use super::console::Console;
use super::exit;
use super::serve::{OnSignal, Served, serve};
use super::signals::Signals;
use super::vmm::{instance_id, read_description};
use crate::backend::{HostFiles, OpenDirectly};
use crate::config::firecracker::{Level, Logger, Metrics};
use crate::config::{SerialConfig, Transport};
use crate::control::{FIRECRACKER_VERSION, Fault, Identity, Owner, View};
use crate::jail;
use crate::machine::{End, MachineError};
use crate::memory::{keep_mappings, share_one_heap};
use crate::observe::{Timeline, init_firecracker_log};
use crate::snapshot::{self, Snapshot};
use crate::threads::{self, Kind};

/// Exit codes that its users know.
mod code {
    pub const OK: u8 = 0;
    pub const ERROR: u8 = 1;
    pub const BAD_SYSCALL: i32 = 148;
    pub const BAD_CONFIGURATION: u8 = 152;
    pub const BAD_ARGUMENTS: u8 = 153;
    pub const HANGUP: u8 = 156;
}

/// Is this name of the program one that asks for this personality?
#[must_use]
pub fn is_wanted(name: Option<&OsStr>) -> bool {
    // Its releases, and so those who copy them, have the version in it.
    let name = name.map(Path::new).and_then(Path::file_name);
    name.is_some_and(|name| name.as_encoded_bytes().starts_with(b"firecracker"))
}

/// A micro-VM monitor with Firecracker's interface.
#[derive(Debug, Parser)]
#[command(name = "firecracker", disable_version_flag = true)]
struct FirecrackerArgs {
    /// Path to the unix socket that the API server listens on; it must not exist
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// Log when the guest reaches userspace (it writes 123 to physical address 0xc0000000)
    #[arg(long)]
    boot_timer: bool,
    /// Describe and start the VM from this file
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Tell the version of a snapshot's state file
    #[arg(long, value_name = "FILE")]
    describe_snapshot: Option<PathBuf>,
    /// Virtio devices over PCI instead of MMIO
    #[arg(long)]
    enable_pci: bool,
    /// Largest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 51_200)]
    http_api_max_payload_size: usize,
    /// The VM's id
    #[arg(long, default_value = "anonymous-instance", value_parser = instance_id)]
    id: String,
    /// Least important kind of message that is logged
    #[arg(long)]
    level: Option<Level>,
    /// Where messages go, instead of standard output
    #[arg(long, value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// Data for the metadata service
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// Where metrics go
    #[arg(long, value_name = "FILE")]
    metrics_path: Option<PathBuf>,
    /// Largest data of the metadata service, in bytes
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// Log only what comes from here
    #[arg(long)]
    module: Option<String>,
    /// No API; needs --config-file
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Without system call filters
    #[arg(long)]
    no_seccomp: bool,
    /// CPU time that the parent used before the start, in microseconds
    #[arg(long, value_name = "US")]
    parent_cpu_time_us: Option<u64>,
    /// System call filters of one's own
    #[arg(long, value_name = "FILE")]
    seccomp_filter: Option<PathBuf>,
    /// Log each message's level
    #[arg(long)]
    show_level: bool,
    /// Log where in the program each message comes from
    #[arg(long)]
    show_log_origin: bool,
    /// Print the version of snapshots that are made
    #[arg(long)]
    snapshot_version: bool,
    /// CPU time at the start, in microseconds
    #[arg(long, value_name = "US")]
    start_time_cpu_us: Option<u64>,
    /// Time of the start, in microseconds
    #[arg(long, value_name = "US")]
    start_time_us: Option<u64>,
    /// Print the version
    #[arg(long, short = 'V')]
    version: bool,
}

/// Why there is no VM, and the exit code of that.
struct Failure(u8, String);

impl Failure {
    fn error(text: impl Into<String>) -> Self {
        Self(code::ERROR, text.into())
    }

    fn configuration(fault: &Fault) -> Self {
        Self(code::BAD_CONFIGURATION, format!("Configuration for VM could not be used: {fault}"))
    }
}

/// Runs the program; `start` is when it began.
#[must_use]
pub fn main(start: Instant) -> ExitCode {
    share_one_heap();
    let args = match FirecrackerArgs::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { code::BAD_ARGUMENTS } else { code::OK });
        }
    };
    if args.version {
        exit::print(&format!("Firecracker v{FIRECRACKER_VERSION}\n\nTranche {}\n", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
    }
    if args.snapshot_version {
        exit::print(&format!("v{}.0.0\n", snapshot::FILE_VERSION));
        return ExitCode::SUCCESS;
    }
    if let Some(path) = &args.describe_snapshot {
        return describe(path);
    }
    let exit = match run(&args, &Arc::new(Timeline::from(start))) {
        Ok(Served::Signal(signal)) if signal != libc::SIGHUP => {
            tracing::error!("Shutting down VM after intercepting signal {signal}.");
            crate::cli::signals::die_of(signal)
        }
        Ok(Served::Signal(_)) => code::HANGUP,
        Ok(Served::Ended(End::Fault(fault))) => {
            tracing::error!("{fault}");
            code::ERROR
        }
        Ok(Served::Ended(End::MemoryLost)) => {
            tracing::error!("the process that gave the guest's memory has ended");
            code::ERROR
        }
        Ok(Served::LoadFailed) => {
            tracing::error!("The snapshot could not be loaded.");
            code::ERROR
        }
        Ok(Served::Ended(_)) => {
            tracing::info!("Vmm is stopping.");
            code::OK
        }
        Err(Failure(code, text)) => {
            exit::say(&format!("{text}\n"));
            tracing::error!("{text}");
            code
        }
    };
    if exit == code::OK {
        tracing::info!("Firecracker exiting successfully. exit_code={exit}");
    } else {
        tracing::error!("Firecracker exiting with error. exit_code={exit}");
    }
    // Without unwinding the machine: the host takes everything back at once, and faster than we could.
    std::process::exit(exit.into());
}

/// Tells the version of a snapshot's state.
fn describe(path: &Path) -> ExitCode {
    match Snapshot::read_state(path, &OpenDirectly) {
        Ok(_) => {
            exit::print(&format!("v{}.0.0\n", snapshot::FILE_VERSION));
            ExitCode::SUCCESS
        }
        Err(error) => {
            exit::say(&format!("{}\n", exit::one_line(&error)));
            ExitCode::from(code::ERROR)
        }
    }
}

/// What has a meaning there and none here yet.
fn missing(args: &FirecrackerArgs) -> Option<&'static str> {
    let options = [
        (args.metadata.is_some(), "--metadata"),
        (args.mmds_size_limit.is_some(), "--mmds-size-limit"),
        (args.seccomp_filter.is_some(), "--seccomp-filter"),
    ];
    options.into_iter().find(|option| option.0).map(|option| option.1)
}

fn run(args: &FirecrackerArgs, timeline: &Arc<Timeline>) -> Result<Served, Failure> {
    let resources = |what: &'static str| move |error| Failure::error(format!("Cannot {what}: {error}"));
    init_firecracker_log(&args.id);
    let logger = Logger {
        log_path: args.log_path.clone(),
        level: args.level,
        show_level: args.show_level.then_some(true),
        show_log_origin: args.show_log_origin.then_some(true),
        module: args.module.clone(),
    };
    let host: Arc<dyn HostFiles> = Arc::new(OpenDirectly);
    let transport = if args.enable_pci { Transport::Pci } else { Transport::Mmio { pci: false } };
    let identity = Identity::firecracker(args.id.clone(), transport);
    let serial = SerialConfig::Stdio;
    if args.boot_timer {
        timeline.log_userspace();
    }
    let mut owner = Owner::new(identity, host.clone(), serial.clone(), timeline.clone());
    owner.set_logger(&logger).map_err(|fault| Failure::error(format!("Could not initialize logger: {fault}")))?;
    tracing::info!("Running Firecracker v{FIRECRACKER_VERSION}");
    if let Some(option) = missing(args) {
        return Err(Failure(code::BAD_ARGUMENTS, format!("{option} is not supported by this version.")));
    }
    if let Some(path) = &args.metrics_path {
        let metrics = Metrics { metrics_path: path.clone() };
        owner
            .set_metrics(&metrics)
            .map_err(|fault| Failure::error(format!("Could not initialize metrics: {fault}")))?;
    }
    let mut signals = Signals::block().map_err(resources("listen to signals"))?;
    if !args.no_seccomp {
        jail::prepare_opener(code::BAD_SYSCALL).map_err(resources("filter system calls"))?;
        // Whoever asks for metrics cannot have it opened.
        let _ = keep_mappings();
        threads::confine_with(jail::confine_opener);
        owner.before_guest(Box::new(|_| threads::confine(Kind::Main)));
    }
    let api =
        if args.no_api { None } else { Some(listen(&args.api_sock, args.http_api_max_payload_size, owner.view())?) };
    fatal::exit_with_its_code().map_err(resources("listen to signals"))?;
    if let Some(path) = &args.config_file {
        require_drives_and_kernel(path)?;
        let description =
            read_description(path).map_err(|error| Failure(code::BAD_CONFIGURATION, exit::one_line(&error)))?;
        owner.load(description).map_err(|fault| Failure::configuration(&fault))?;
        owner.start().map_err(|fault| Failure::configuration(&fault))?;
        tracing::info!("Successfully started microvm that was configured from one single json");
    }
    let mut console = Console::open(&serial, &host).map_err(resources("use the terminal"))?;
    serve(owner, &mut console, &mut signals, OnSignal::Leave, api).map_err(resources("wait for events"))
}

/// In a file of Firecracker's they have to be there, if only as an empty list.
fn require_drives_and_kernel(path: &Path) -> Result<(), Failure> {
    #[derive(serde::Deserialize)]
    struct Required {
        #[serde(rename = "drives")]
        _drives: serde::de::IgnoredAny,
        #[serde(rename = "boot-source")]
        _boot_source: serde::de::IgnoredAny,
    }
    let wrong = |error: &dyn std::fmt::Display| {
        Failure(
            code::BAD_CONFIGURATION,
            format!("Configuration for VM could not be read from {}: {error}", path.display()),
        )
    };
    let text = std::fs::read(path).map_err(|error| wrong(&error))?;
    serde_json::from_slice::<Required>(&text).map(drop).map_err(|error| wrong(&error))
}

/// Signals that end the process at once, with an exit code that tells which.
mod fatal {
    #![expect(unsafe_code, reason = "the end of the process within a signal handler")]

    use std::io;

    use libc::{SIGBUS, SIGILL, SIGSEGV, SIGXCPU, SIGXFSZ};

    const CODES: [(libc::c_int, libc::c_int); 5] =
        [(SIGBUS, 149), (SIGSEGV, 150), (SIGXFSZ, 151), (SIGXCPU, 154), (SIGILL, 157)];

    extern "C" fn end(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let code = CODES.iter().find(|(known, _)| *known == signal).map_or(1, |(_, code)| *code);
        // SAFETY: the call is allowed in a handler, takes no locks and runs nothing else.
        unsafe { libc::_exit(code) };
    }

    pub fn exit_with_its_code() -> io::Result<()> {
        for (signal, _) in CODES {
            vmm_sys_util::signal::register_signal_handler(signal, end)?;
        }
        Ok(())
    }
}

fn listen(path: &Path, max_body: usize, view: Arc<View>) -> Result<RunningApi, Failure> {
    let in_use = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Failure::error(format!(
            "Failed to open the API socket at: {}. Check that it is not already used.",
            path.display()
        )),
        _ => Failure::error(format!("Failed to open the API socket at: {}: {error}", path.display())),
    };
    let mut socket = ApiSocket::listen_anew(path).map_err(in_use)?;
    socket.thread = "fc_api";
    socket.max_body = max_body;
    tracing::info!("Listening on API socket ({:?}).", path);
    let api =
        socket.into_clients().serve(view).map_err(|error| Failure::error(format!("Cannot serve the API: {error}")))?;
    tracing::info!("API server started.");
    Ok(api)
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        Self::error(Fault::from(error).to_string())
    }
}
