//! `tranche create`: a VM that has a name, and lives on.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use super::failure::{Failure, conclude};
use crate::cli::exit;
use crate::cli::run::JailArgs;
use crate::cli::start_error::StartError;
use crate::cli::vm_args::VmArgs;
use crate::config::MacAddress;
use crate::devices::net::random_mac;
use crate::kernels::{KernelsError, Library};
use crate::machine::MachineError;
use crate::store::{Definition, Store, Vm, is_kernel_name};

/// Make a VM that has a name and outlives its process
///
/// It is kept on disk until 'tranche rm'; 'tranche start' starts it.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct CreateArgs {
    /// 1 to 48 letters, digits, '-', '_' and '.'
    name: String,

    #[command(flatten)]
    new: NewVm,
}

/// What a named VM is made of.
#[derive(Debug, Args)]
pub struct NewVm {
    #[command(flatten)]
    pub vm: VmArgs,

    #[command(flatten)]
    pub named: NamedArgs,

    #[command(flatten)]
    pub jail: JailArgs,
}

/// What only a named VM has.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// What the guest writes to its console when it is up, such as 'login:'. Without it, it is up when it drives its root disk
    #[arg(long, value_name = "TEXT", requires = "name")]
    ready: Option<String>,
}

pub fn run(args: CreateArgs) -> ExitCode {
    conclude(Store::of_user().map_err(Failure::from).and_then(|store| {
        create(&store, &args.name, args.new)?;
        exit::print(&format!("{}\n", args.name));
        Ok(())
    }))
}

/// Makes a VM, of files that are there.
pub fn create(store: &Store, name: &str, new: NewVm) -> Result<Vm, Failure> {
    let mut definition = new.vm.into_definition()?;
    definition.ready = new.named.ready.or(definition.ready);
    let jail = new.jail.or(&definition);
    (definition.jail, definition.share) = (jail.level(), jail.share);
    find_kernel(&mut definition)?;
    definition.settle(Path::new("")).map_err(Failure::host("tell the current directory"))?;
    definition.vm.validate().map_err(|error| StartError::from(MachineError::from(error)))?;
    check_files(&definition)?;
    for nic in &mut definition.vm.nics {
        if nic.mac.is_none() {
            // It stays the same from start to start: guests know their cards by it.
            nic.mac = Some(MacAddress(random_mac().map_err(Failure::host("find a MAC address"))?));
        }
    }
    Ok(store.create(name, &definition)?)
}

/// A word is an imported kernel's name, or else a file in this directory; later it must not matter in which.
fn find_kernel(definition: &mut Definition) -> Result<(), KernelsError> {
    let kernel = &mut definition.vm.kernel;
    let Some(name) = kernel.to_str().filter(|_| is_kernel_name(kernel)) else { return Ok(()) };
    match Library::of_user().and_then(|library| library.find(name)) {
        Err(KernelsError::Unknown(_) | KernelsError::NoPlace) if kernel.exists() => {
            *kernel = Path::new(".").join(&*kernel);
            Ok(())
        }
        found => found.map(drop),
    }
}

/// A VM that could never start is not made.
fn check_files(definition: &Definition) -> Result<(), Failure> {
    let vm = &definition.vm;
    let check = |what, path: &Path| match File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(Failure::File { what, path: path.to_owned(), source }),
    };
    if !is_kernel_name(&vm.kernel) {
        check("kernel", &vm.kernel)?;
    }
    vm.initrd.iter().try_for_each(|path| check("initrd", path))?;
    definition.disk_paths().try_for_each(|path| check("disk", path))
}
