//! `tranche kernel`: imports kernels of distributions, lists and removes them.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::exit::{self, Exit};
use super::table::{Format, Table};
use crate::config::MemorySize;
use crate::kernels::{self, Bundle, KernelsError, Library, Source};

const HELP: &str = "\
Imported kernels are in $XDG_DATA_HOME/tranche/kernels; without that variable in /var/lib/tranche/kernels for root,
and in ~/.local/share/tranche/kernels for others.
Exit status: 0 done, 2 wrong usage, 60 there is no such kernel, 61 there is one already, 62 the package cannot be
read, 63 it cannot be used, 64 the directory of imported kernels fails, 65 an imported kernel is damaged.
See docs/kernels.md.";

/// Import kernels of distributions, to boot them by name
#[derive(Debug, Subcommand)]
#[command(after_help = HELP)]
pub enum KernelVerb {
    Import(ImportArgs),
    Ls(LsArgs),
    Rm(RmArgs),
}

/// Import a kernel from a Debian package, or from a directory
///
/// What comes out is the unpacked kernel, and an initrd with the modules that a guest of Tranche needs: it finds the
/// root file system by root=/dev/NAME, LABEL=, UUID=, PARTLABEL= or PARTUUID= (ext4, xfs, btrfs, squashfs, erofs).
/// Boot it with 'tranche run --kernel NAME'.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct ImportArgs {
    /// A package (linux-image-*.deb), or a directory that holds boot/vmlinuz-* and lib/modules, such as /
    #[arg(value_name = "PACKAGE.deb|DIR")]
    source: PathBuf,

    /// What to call it: 1 to 64 characters of a-z, 0-9, '.', '_' and '-', the first a letter or digit
    name: String,

    /// Which kernel, if there are several: as 'uname -r' says it
    #[arg(long)]
    release: Option<String>,

    /// Replace an imported kernel of this name; running VMs keep theirs
    #[arg(long)]
    force: bool,
}

/// List imported kernels
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct LsArgs {
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,

    /// Print names only
    #[arg(short, long)]
    quiet: bool,
}

/// Remove imported kernels
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct RmArgs {
    /// Running VMs keep theirs
    #[arg(required = true)]
    name: Vec<String>,
}

pub fn run(verb: KernelVerb) -> ExitCode {
    let done = Library::of_user().and_then(|library| match verb {
        KernelVerb::Import(args) => import(&library, &args),
        KernelVerb::Ls(args) => ls(&library, &args),
        KernelVerb::Rm(args) => args.name.iter().try_for_each(|name| library.remove(name)),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(exit::report_kernels(&error) as u8),
    }
}

/// The exit code and hint of an error.
pub(super) fn judge(error: &KernelsError) -> (Exit, Option<String>) {
    let exit = match error {
        KernelsError::Name(_) => Exit::Usage,
        KernelsError::Unknown(_) => Exit::NoSuchKernel,
        KernelsError::Exists(_) => Exit::KernelExists,
        KernelsError::Read { .. } => Exit::PackageUnreadable,
        KernelsError::Unusable { .. } => Exit::PackageUnusable,
        KernelsError::Library { .. } | KernelsError::NoPlace => Exit::KernelLibrary,
        KernelsError::Damaged { .. } => Exit::KernelBundleDamaged,
    };
    (exit, Some(error.hint()))
}

fn import(library: &Library, args: &ImportArgs) -> Result<(), KernelsError> {
    // Not the path the program was started by: that may name something else by now.
    let init = PathBuf::from("/proc/self/exe");
    let source = Source { path: &args.source, release: args.release.as_deref(), init: &init };
    let bundle = kernels::import(library, &source, &args.name, args.force)?;
    exit::print(&format!(
        "imported {}: Linux {}, {} modules, root on {}\n",
        bundle.name,
        bundle.manifest.release,
        bundle.manifest.modules.len(),
        bundle.manifest.file_systems.join(", ")
    ));
    if !bundle.manifest.missing.is_empty() {
        exit::say(&format!("tranche: this kernel lacks {}\n", bundle.manifest.missing.join(", ")));
    }
    Ok(())
}

fn ls(library: &Library, args: &LsArgs) -> Result<(), KernelsError> {
    let mut bundles = Vec::new();
    for found in library.list()? {
        match found {
            Ok(bundle) => bundles.push(bundle),
            Err(error) => {
                exit::report_kernels(&error);
            }
        }
    }
    let text = if args.quiet {
        bundles.iter().map(|bundle| format!("{}\n", bundle.name)).collect()
    } else if args.format == Format::Json {
        let all: Vec<_> = bundles.iter().map(json).collect();
        format!("{:#}\n", serde_json::Value::from(all))
    } else {
        let mut table = Table::new(&["NAME", "RELEASE", "SIZE", "ROOT ON", "TRANCHE"]);
        for bundle in &bundles {
            let manifest = &bundle.manifest;
            // In whole MiB, which are easier to read.
            let size = MemorySize(bundle.size().next_multiple_of(1 << 20)).to_string();
            table.row([&bundle.name, &manifest.release, &size, &manifest.file_systems.join(","), &manifest.tranche]);
        }
        table.to_string()
    };
    exit::print(&text);
    Ok(())
}

fn json(bundle: &Bundle) -> serde_json::Value {
    let mut value = serde_json::to_value(&bundle.manifest).expect("a manifest is plain data");
    value["name"] = bundle.name.clone().into();
    value["size"] = bundle.size().into();
    value["kernel"] = bundle.kernel().to_string_lossy().into();
    value["initrd"] = bundle.initrd().to_string_lossy().into();
    value
}
