//! From a distribution's package, or a tree of files, to a bundle.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::error::{Flaw, KernelsError};
use super::initrd::Archive;
use super::library::{self, Bundle, Library, Manifest};
use super::modules::{Index, Selection};
use super::package::{self, UnpackError};
use super::tree;
use crate::boot::{self, BootFile};
use crate::guest_init::{MODULES_DIR, MODULES_ORDER};

/// What to import.
pub struct Source<'a> {
    /// A package, or a directory with `boot` and `lib/modules` in it.
    pub path: &'a Path,
    /// Which kernel, if there are several.
    pub release: Option<&'a str>,
    /// The program to be the initrd's init: this one.
    pub init: &'a Path,
}

/// Imports a kernel under `name`.
///
/// # Errors
/// The first thing that is wrong; the library is then as it was.
pub fn import(library: &Library, source: &Source<'_>, name: &str, replace: bool) -> Result<Bundle, KernelsError> {
    let read = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelsError::Read { path, source }
    };
    let unusable = |flaw| KernelsError::Unusable { path: source.path.to_owned(), source: flaw };
    let is_dir = fs::metadata(source.path).map_err(read(source.path))?.is_dir();
    let path = fs::canonicalize(source.path).map_err(read(source.path))?;
    let bundle = library.begin(name, replace)?;

    let unpacked = bundle.dir().join("unpacked");
    let sha256 = if is_dir {
        None
    } else {
        let mut package = tree::open_regular(&path).map_err(read(source.path))?;
        fs::create_dir(&unpacked).map_err(bundle.failed())?;
        package::unpack(&mut package, &unpacked).map_err(|error| match error {
            UnpackError::Flaw(flaw) => unusable(flaw),
            UnpackError::Read(error) => read(source.path)(error),
            UnpackError::Write(error) => bundle.failed()(error),
        })?;
        Some(hash(&mut package).map_err(read(source.path))?)
    };
    let tree = tree::find(if is_dir { &path } else { &unpacked }, source.release).map_err(unusable)?;
    let selection = Index::read(&tree.modules).and_then(|index| index.select()).map_err(unusable)?;

    let kernel = tree::open_regular(&tree.kernel).map_err(read(&tree.kernel))?;
    let kernel = BootFile { file: kernel, path: tree.kernel.clone() };
    let to = File::create_new(bundle.dir().join(library::KERNEL)).map_err(bundle.failed())?;
    let unpacked_kernel = boot::unpack(&kernel).map_err(|error| unusable(Flaw::Kernel(Box::new(error))))?;
    let from = unpacked_kernel.as_ref().unwrap_or(&kernel.file);
    from.metadata().and_then(|metadata| boot::copy_sparse(from, &to, metadata.len())).map_err(bundle.failed())?;

    let init = fs::read(source.init).map_err(read(source.init))?;
    let to = File::create_new(bundle.dir().join(library::INITRD)).map_err(bundle.failed())?;
    write_initrd(to, &init, &selection).map_err(bundle.failed())?;
    if !is_dir {
        fs::remove_dir_all(&unpacked).map_err(bundle.failed())?;
    }
    bundle.finish(&Manifest {
        version: Manifest::VERSION,
        release: tree.release,
        source: path,
        sha256,
        imported: Manifest::now(),
        tranche: env!("CARGO_PKG_VERSION").into(),
        file_systems: selection.file_systems,
        modules: selection.modules.into_iter().map(|module| module.0).collect(),
        missing: selection.missing,
    })
}

/// The SHA-256 of a whole file, in hex.
fn hash(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let (mut hasher, mut chunk) = (Sha256::new(), vec![0; 256 << 10]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hasher.update(&chunk[..n]),
        }
    }
}

fn write_initrd(to: File, init: &[u8], selection: &Selection) -> io::Result<()> {
    let mut archive = Archive::new(BufWriter::new(to));
    for dir in ["dev", "proc", "sys", "root"] {
        archive.directory(dir)?;
    }
    // The kernel opens it for init before there is a devtmpfs.
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.file("init", 0o755, init)?;
    let modules = MODULES_DIR.trim_start_matches('/');
    archive.directory(modules)?;
    let at = |name: &str| format!("{modules}/{name}");
    let file = |name: &str| format!("{name}.ko.lz4");
    let order: String = (selection.groups.iter())
        .flat_map(|(group, names)| names.iter().map(move |name| format!("{group} {}\n", file(name))))
        .collect();
    archive.file(&at(MODULES_ORDER), 0o644, order.as_bytes())?;
    for (name, content) in &selection.modules {
        archive.file(&at(&file(name)), 0o644, &lz4_flex::compress_prepend_size(content))?;
    }
    archive.finish()?;
    Ok(())
}
