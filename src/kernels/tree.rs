//! The tree of files that a kernel package unpacks to, or that a running system has.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::error::Flaw;

/// A kernel and its modules.
#[derive(Debug, PartialEq, Eq)]
pub struct Tree {
    pub release: String,
    pub kernel: PathBuf,
    pub modules: PathBuf,
}

/// As the kernel limits it, and safe to print.
fn is_release(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+~-".contains(&b))
}

/// Opens a file for reading, and nothing that is none: a pipe would have us wait, a device would never end.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok(file)
}

/// Finds the kernel of this release, or the only one there is.
pub fn find(dir: &Path, release: Option<&str>) -> Result<Tree, Flaw> {
    let mut kernels = kernels(dir);
    kernels.retain(|kernel| is_release(&kernel.0));
    kernels.sort();
    kernels.dedup_by(|a, b| a.0 == b.0);
    let all = || kernels.iter().map(|kernel| kernel.0.as_str()).collect::<Vec<_>>().join(", ");
    let (release, kernel) = match (release, &kernels[..]) {
        (_, []) => return Err(Flaw::NoKernel),
        (Some(wanted), _) => {
            kernels.iter().find(|kernel| kernel.0 == wanted).ok_or_else(|| Flaw::NoSuchRelease(wanted.into(), all()))?
        }
        (None, [one]) => one,
        (None, _) => return Err(Flaw::SeveralKernels(all())),
    };
    let modules = ["lib/modules", "usr/lib/modules"].map(|at| dir.join(at).join(release));
    let modules = modules.into_iter().find(|dir| dir.is_dir()).ok_or_else(|| Flaw::NoModules(release.clone()))?;
    Ok(Tree { release: release.clone(), kernel: kernel.clone(), modules })
}

/// Debian's place for a kernel, then that of Fedora and Arch Linux.
fn kernels(dir: &Path) -> Vec<(String, PathBuf)> {
    let names = |at: &Path| {
        let entries = fs::read_dir(dir.join(at)).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect::<Vec<_>>()
    };
    let mut found = Vec::new();
    for name in names(Path::new("boot")) {
        if let Some(release) = name.strip_prefix("vmlinuz-") {
            found.push((release.to_owned(), dir.join("boot").join(&name)));
        }
    }
    for at in ["lib/modules", "usr/lib/modules"] {
        for release in names(Path::new(at)) {
            let kernel = dir.join(at).join(&release).join("vmlinuz");
            if kernel.is_file() {
                found.push((release, kernel));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(dir: &Path, path: &str) {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    #[test]
    fn one_kernel_is_found_and_of_several_one_has_to_be_chosen() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        assert!(matches!(find(at, None), Err(Flaw::NoKernel)));
        put(at, "boot/vmlinuz-1");
        assert!(matches!(find(at, None), Err(Flaw::NoModules(release)) if release == "1"));
        put(at, "lib/modules/1/modules.builtin");
        let first = Tree { release: "1".into(), kernel: at.join("boot/vmlinuz-1"), modules: at.join("lib/modules/1") };
        assert_eq!(find(at, None).unwrap(), first);
        put(at, "usr/lib/modules/2/vmlinuz");
        assert!(matches!(find(at, None), Err(Flaw::SeveralKernels(all)) if all == "1, 2"));
        assert_eq!(find(at, Some("1")).unwrap(), first);
        assert_eq!(find(at, Some("2")).unwrap().kernel, at.join("usr/lib/modules/2/vmlinuz"));
        assert!(matches!(find(at, Some("3")), Err(Flaw::NoSuchRelease(..))));
    }
}
