//! `tranche snapshot`: save a running VM, look at what was saved, check it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::api;
use super::exit::{self, Exit};
use super::vm::Target;
use crate::backend::OpenDirectly;
use crate::config::{MemorySize, NetBackend};
use crate::snapshot::{Folder, SnapshotError};

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Save a VM, with its memory and its devices; it goes on meanwhile
    Create(CreateArgs),
    /// Read all of a snapshot and compare it with its checksums
    Verify {
        /// The snapshot's directory
        dir: PathBuf,
    },
    /// Show what a snapshot is of, and what it needs
    Inspect {
        /// The snapshot's directory
        dir: PathBuf,
        /// As JSON: the manifest, and the configuration
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// The VM, by its name or its API socket
    #[arg(value_name = "NAME|SOCKET")]
    socket: Target,
    /// The directory to make
    dir: PathBuf,
    /// End the VM when it is saved, without letting it run on
    #[arg(long)]
    stop: bool,
    /// Leave the disks where they are: who restores it has to have them as they are now
    #[arg(long)]
    no_disks: bool,
}

pub fn run(args: SnapshotArgs) -> ExitCode {
    let done = match args.verb {
        Verb::Create(args) => return create(&args),
        Verb::Verify { dir } => verify(&dir),
        Verb::Inspect { dir, json } => inspect(&dir, json),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(report(&error) as u8),
    }
}

/// Prints what is wrong with a snapshot, and tells the exit code.
pub fn report(error: &SnapshotError) -> Exit {
    let exit = match error {
        SnapshotError::Read { .. } | SnapshotError::NotASnapshot(_) => Exit::SnapshotUnreadable,
        SnapshotError::Damaged { .. } | SnapshotError::Syntax { .. } | SnapshotError::NotAPart { .. } => {
            Exit::SnapshotDamaged
        }
        SnapshotError::Version { .. } => Exit::SnapshotIncompatible,
        SnapshotError::Exists(_) | SnapshotError::Write { .. } | SnapshotError::Overlay { .. } => {
            Exit::SnapshotUnwritable
        }
    };
    exit::report_with(error, exit, error.hint().map(str::to_owned))
}

fn create(args: &CreateArgs) -> ExitCode {
    // The VM's process makes the directory, and it may be elsewhere.
    let dir = match std::path::absolute(&args.dir) {
        Ok(dir) => dir,
        Err(source) => return ExitCode::from(report(&SnapshotError::Write { path: args.dir.clone(), source }) as u8),
    };
    let body = serde_json::json!({ "path": dir, "stop": args.stop, "disks": !args.no_disks });
    api::ask_target(&args.socket, "PUT", "/v2/vm/snapshot", Some(body.to_string().as_bytes()))
}

fn verify(dir: &std::path::Path) -> Result<(), SnapshotError> {
    let folder = Folder::open(dir, &OpenDirectly)?;
    let changed = folder.verify(&OpenDirectly)?;
    let parts = folder.manifest.parts.len();
    exit::print(&format!("{}: {parts} parts are as they were written", dir.display()));
    for part in changed {
        exit::print(&format!(", but for {part}, which somebody has changed (and may)"));
    }
    exit::print("\n");
    Ok(())
}

fn inspect(dir: &std::path::Path, json: bool) -> Result<(), SnapshotError> {
    let folder = Folder::open(dir, &OpenDirectly)?;
    let (manifest, config) = (&folder.manifest, &folder.snapshot.config);
    if json {
        let text = serde_json::json!({ "manifest": manifest, "config": config });
        exit::print(&format!("{text:#}\n"));
        return Ok(());
    }
    let mut text = format!("made by       {} at {}\n", manifest.creator, manifest.created);
    text += &format!("vCPUs         {} of {}\n", config.cpus, manifest.cpu.vendor);
    let stored = folder.stored_memory().map_or_else(|_| String::from("?"), |bytes| MemorySize(bytes).to_string());
    text += &format!("memory        {}, of which {stored} are stored\n", config.memory);
    for disk in &config.disks {
        let place = if disk.stored { "part of the snapshot, " } else { "" };
        text += &format!("disk          {}: {place}{}\n", disk.name, disk.config.path.display());
    }
    for nic in &config.nics {
        let network = match &nic.config.backend {
            NetBackend::Tap(tap) => format!("tap {}", tap.name),
            NetBackend::User(_) => "user network".into(),
        };
        text += &format!("network card  {}: {network}\n", nic.name);
    }
    text += &format!("CPU features  {}\n", manifest.cpu.features.join(" "));
    exit::print(&text);
    Ok(())
}
