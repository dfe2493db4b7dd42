//! Why a command about a named VM was not done.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use thiserror::Error;

use crate::api::client::ClientError;
use crate::backend::disk::tools::ToolError;
use crate::cli::exit::{self, Exit};
use crate::cli::start_error::StartError;
use crate::kernels::KernelsError;
use crate::resize::ResizeError;
use crate::store::{StoreError, Vm};

#[derive(Debug, Error)]
pub enum Failure {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Kernels(#[from] KernelsError),
    #[error(transparent)]
    Resize(#[from] ResizeError),
    #[error("cannot read the {what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot ask the VM '{name}'")]
    Client { name: String, source: ClientError },
    #[error("the VM '{name}' refuses: {text}")]
    Refused { name: String, text: String },
    #[error("the VM '{name}' has not {done} within {} s", patience.as_secs_f64())]
    TimedOut { name: String, done: &'static str, patience: Duration },
    #[error("the VM '{name}' has ended: {why}")]
    Ended { name: String, why: String },
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
    /// It has been said why; what is left to tell is the exit code.
    #[error("it is not done")]
    Said(u8),
}

impl Failure {
    pub fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    pub fn client(vm: &Vm) -> impl FnOnce(ClientError) -> Self {
        let name = vm.name().to_owned();
        move |source| Self::Client { name, source }
    }

    /// Prints why, and tells the exit code.
    pub fn report(&self) -> u8 {
        let (exit, hint) = match self {
            Self::Store(error) => return exit::report_store(error) as u8,
            Self::Start(error) => return error.report() as u8,
            Self::Kernels(error) => return exit::report_kernels(error) as u8,
            Self::Resize(error) => return report_resize(error) as u8,
            Self::Said(code) => return *code,
            Self::File { what, .. } => {
                let exit = match *what {
                    "kernel" => Exit::KernelUnreadable,
                    "initrd" => Exit::InitrdUnreadable,
                    _ => Exit::DiskUnreadable,
                };
                (exit, Some("check the path and its permissions".to_owned()))
            }
            Self::Client { source, .. } => (Exit::NoApi, source.hint().map(str::to_owned)),
            Self::Refused { .. } => (Exit::ApiRefused, None),
            Self::TimedOut { name, done, .. } => {
                let hint = match *done {
                    "stopped" => format!("'tranche kill {name}' pulls its plug; a longer --timeout waits longer"),
                    _ => format!("'tranche logs {name}' shows how far it has come"),
                };
                (Exit::TimedOut, Some(hint))
            }
            Self::Ended { name, .. } => (Exit::VmNotRunning, Some(format!("'tranche logs {name}' shows its console"))),
            Self::Host { .. } => (Exit::Internal, None),
        };
        exit::report_with(self, exit, hint) as u8
    }
}

/// Prints why a VM did not get another size, and tells the exit code.
pub fn report_resize(error: &ResizeError) -> Exit {
    let exit = match error {
        ResizeError::Disk(error) => exit::judge_disk(error),
        ResizeError::Image(ToolError::Disk(error)) => exit::judge_disk(error),
        ResizeError::Definition(_) | ResizeError::NoSuchDisk { .. } | ResizeError::Size(_) => Exit::Usage,
        _ => Exit::NotResized,
    };
    exit::report_with(error, exit, error.hint())
}

/// Ends a verb.
pub fn conclude(done: Result<(), Failure>) -> ExitCode {
    conclude_with(done.map(|()| 0))
}

/// Ends a verb that has an exit code of its own.
pub fn conclude_with(done: Result<u8, Failure>) -> ExitCode {
    ExitCode::from(done.unwrap_or_else(|failure| failure.report()))
}
