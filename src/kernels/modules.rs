//! Which modules a guest needs, and in which order.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::error::Flaw;
use super::modinfo;
use super::package::{UnpackError, uncompressed};
use super::tree::open_regular;
use crate::guest_init::superblock::FileSystem;

/// What every guest gets: our devices, the power button (which reaches user space as an input device), the report of
/// a panic, and sockets to the host.
const BASE: [&str; 9] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
    "pvpanic_mmio",
];

/// Largest module in bytes, uncompressed.
const MAX_MODULE: u64 = 64 << 20;
/// Largest group, and all modules of an initrd together in bytes. Debian's need 20, and 8 MiB.
const MAX_GROUP: usize = 256;
const MAX_MODULES: u64 = 256 << 20;
/// Bytes of modules that are looked at for their aliases. Debian's are 20 MiB.
const MAX_ALIASED: u64 = 1 << 30;
/// Largest list of what is built in, in bytes. Debian's are 10 KiB.
const MAX_LIST: u64 = 4 << 20;

/// The modules of one kernel.
pub struct Index {
    dir: PathBuf,
    /// By normalized name.
    files: HashMap<String, PathBuf>,
    builtin: HashSet<String>,
    /// Names that stand for one of several algorithms.
    aliases: OnceCell<HashMap<String, Vec<String>>>,
}

/// What goes into an initrd.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Name and content.
    pub modules: Vec<(String, Vec<u8>)>,
    /// Group and the names of what it loads, in order.
    pub groups: Vec<(String, Vec<String>)>,
    /// File systems that this kernel can mount.
    pub file_systems: Vec<String>,
    /// Names that this kernel does not know.
    pub missing: Vec<String>,
    /// Of all modules read, in bytes.
    total: u64,
}

/// Module names treat `-` and `_` alike, file names do not.
fn normalized(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (name, ending) = name.split_once(".ko")?;
    (ending.is_empty() || ending.starts_with('.')).then(|| normalized(name))
}

impl Index {
    pub fn read(dir: &Path) -> Result<Self, Flaw> {
        let mut files = HashMap::new();
        // Links are not followed: `build` and `source` lead out of the tree.
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                match (entry.file_type(), module_name(&entry.path())) {
                    (Ok(kind), _) if kind.is_dir() => dirs.push(entry.path()),
                    (Ok(kind), Some(name)) if kind.is_file() => drop(files.insert(name, entry.path())),
                    _ => {}
                }
            }
        }
        let builtin = list(&dir.join("modules.builtin"))?;
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { dir: dir.to_owned(), files, builtin, aliases: OnceCell::new() })
    }

    /// Chooses the modules for a guest.
    pub fn select(&self) -> Result<Selection, Flaw> {
        let mut selection = Selection::default();
        let mut base = Vec::new();
        for name in BASE {
            if !self.add(name, &mut base, &mut selection)? {
                selection.missing.push(name.into());
            }
        }
        let has = |name: &str| !selection.missing.iter().any(|missing| missing == name);
        if !has("virtio_pci") && !has("virtio_mmio") {
            return Err(Flaw::NoDriver("virtio over PCI or MMIO"));
        }
        if !has("virtio_blk") {
            return Err(Flaw::NoDriver("virtio disks"));
        }
        selection.groups.push((crate::guest_init::MODULES_BASE.into(), base));
        for file_system in FileSystem::ALL.map(FileSystem::name) {
            let mut group = Vec::new();
            if self.add(file_system, &mut group, &mut selection)? {
                selection.file_systems.push(file_system.into());
                selection.groups.push((file_system.into(), group));
            } else {
                selection.missing.push(file_system.into());
            }
        }
        if selection.file_systems.is_empty() {
            return Err(Flaw::NoDriver("any of the root file systems ext4, xfs, btrfs, squashfs and erofs"));
        }
        Ok(selection)
    }

    /// Appends a module to `group` behind all that it needs; `false` if this kernel does not know it.
    fn add(&self, name: &str, group: &mut Vec<String>, selection: &mut Selection) -> Result<bool, Flaw> {
        let name = normalized(name);
        if group.contains(&name) || self.builtin.contains(&name) {
            return Ok(true);
        }
        let Some(path) = self.files.get(&name) else {
            let Some(names) = self.aliases().get(&name) else { return Ok(false) };
            for name in names {
                self.add(name, group, selection)?;
            }
            return Ok(true);
        };
        // In its place in the order before what it needs, so that a circle ends. So does a long chain: each is one call.
        let at = group.len();
        group.push(name.clone());
        let content = read(path)?;
        selection.total += content.len() as u64;
        if group.len() > MAX_GROUP || selection.total > MAX_MODULES {
            let most = MAX_MODULES >> 20;
            return Err(Flaw::TooLarge(format!("it needs more than {MAX_GROUP} modules, or {most} MiB of them")));
        }
        let broken = |why: &str| Flaw::Module { name: name.clone(), why: why.into() };
        let info = modinfo::section(&content).ok_or_else(|| broken("it is no module"))?;
        let needs = modinfo::values(info, "depends").flat_map(|value| value.split(','));
        // `softdep=pre: a b post: c`
        let soft =
            modinfo::values(info, "softdep").filter_map(|value| value.split("pre:").nth(1)?.split("post:").next());
        let needs =
            needs.map(|need| (need, true)).chain(soft.flat_map(str::split_whitespace).map(|need| (need, false)));
        for (need, hard) in needs.filter(|(need, _)| !need.is_empty()) {
            if !self.add(need, group, selection)? && hard {
                return Err(broken(&format!("it needs the module {need:?}, which is not there")));
            }
        }
        group[at..].rotate_left(1);
        if !selection.modules.iter().any(|module| module.0 == name) {
            selection.modules.push((name, content));
        }
        Ok(true)
    }

    /// The aliases of cryptographic and library modules, which is what others softly depend on.
    fn aliases(&self) -> &HashMap<String, Vec<String>> {
        self.aliases.get_or_init(|| {
            let mut aliases: HashMap<String, Vec<String>> = HashMap::new();
            let mut paths: Vec<_> = self.files.iter().collect();
            paths.sort();
            let mut left = MAX_ALIASED;
            for (name, path) in paths {
                let inside = path.strip_prefix(&self.dir).unwrap_or(path);
                if !inside.components().any(|part| ["crypto", "lib"].iter().any(|dir| part.as_os_str() == *dir)) {
                    continue;
                }
                let Ok(content) = read(path) else { continue };
                let Some(rest) = left.checked_sub(content.len() as u64) else { break };
                left = rest;
                let Some(info) = modinfo::section(&content) else { continue };
                for alias in modinfo::values(info, "alias") {
                    aliases.entry(normalized(alias)).or_default().push(name.clone());
                }
            }
            aliases
        })
    }
}

/// The names of what is built in; empty if the kernel has no such list.
fn list(path: &Path) -> Result<String, Flaw> {
    let damaged = |error: &dyn std::fmt::Display| Flaw::Damaged(format!("modules.builtin: {error}"));
    let file = match open_regular(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        file => file.map_err(|error| damaged(&error))?,
    };
    let mut text = String::new();
    file.take(MAX_LIST + 1).read_to_string(&mut text).map_err(|error| damaged(&error))?;
    if text.len() as u64 > MAX_LIST {
        return Err(Flaw::TooLarge(format!("modules.builtin has more than {} MiB", MAX_LIST >> 20)));
    }
    Ok(text)
}

/// A module's content, uncompressed.
fn read(path: &Path) -> Result<Vec<u8>, Flaw> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let broken = |why: String| Flaw::Module { name: name.to_string(), why };
    let file = open_regular(path).map_err(|error| broken(error.to_string()))?;
    let ending = name.split_once(".ko").map_or("", |(_, ending)| ending);
    let stream = uncompressed(BufReader::new(file), ending).map_err(|error| match error {
        UnpackError::Flaw(flaw) => broken(flaw.to_string()),
        UnpackError::Read(error) | UnpackError::Write(error) => broken(error.to_string()),
    })?;
    let mut content = Vec::new();
    stream.take(MAX_MODULE + 1).read_to_end(&mut content).map_err(|error| broken(error.to_string()))?;
    if content.len() as u64 > MAX_MODULE {
        return Err(broken(format!("it is larger than {} MiB", MAX_MODULE >> 20)));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::super::modinfo::tests::module;
    use super::*;

    /// A kernel with these modules, `path` and `.modinfo` each.
    fn kernel(builtin: &str, modules: &[(&str, &str)]) -> (tempfile::TempDir, Index) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        for (path, info) in modules {
            let path = dir.path().join("kernel").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, module(info.as_bytes())).unwrap();
        }
        let index = Index::read(dir.path()).unwrap();
        (dir, index)
    }

    const BUILT_IN: &str =
        "kernel/drivers/virtio/virtio_mmio.ko\nkernel/drivers/virtio_blk.ko\nkernel/fs/squashfs/squashfs.ko\n";

    #[test]
    fn what_is_needed_comes_first_and_each_once() {
        let (_dir, index) = kernel(
            BUILT_IN,
            &[
                ("drivers/virtio-pci.ko", "depends=virtio_ring,legacy\0"),
                ("drivers/virtio_ring.ko", "depends=\0"),
                ("drivers/legacy.ko", "depends=virtio-ring\0"),
                ("fs/ext4.ko", "depends=jbd2\0softdep=pre: crc32c nobody post: later\0"),
                ("fs/jbd2.ko", "depends=\0"),
                ("fs/later.ko", "depends=\0"),
                ("crypto/crc32c_generic.ko", "depends=\0alias=crc32c\0"),
                ("arch/x86/crypto/crc32c-intel.ko", "depends=\0alias=crc32c\0"),
                ("drivers/unrelated.ko", "depends=\0alias=crc32c\0"),
            ],
        );
        let selection = index.select().unwrap();
        let group = |name: &str| selection.groups.iter().find(|group| group.0 == name).unwrap().1.join(" ");
        assert_eq!(group("base"), "virtio_ring legacy virtio_pci");
        assert_eq!(group("ext4"), "jbd2 crc32c_generic crc32c_intel ext4");
        assert_eq!(group("squashfs"), "");
        assert_eq!(selection.file_systems, ["ext4", "squashfs"]);
        assert!(selection.missing.contains(&"xfs".into()) && selection.missing.contains(&"evdev".into()));
        let names: Vec<_> = selection.modules.iter().map(|module| module.0.as_str()).collect();
        assert_eq!(names, ["virtio_ring", "legacy", "virtio_pci", "jbd2", "crc32c_generic", "crc32c_intel", "ext4"]);
    }

    #[test]
    fn circles_end_and_holes_are_named() {
        let circle = [("a/ext4.ko", "depends=b\0"), ("a/b.ko", "depends=ext4\0")];
        assert!(kernel(BUILT_IN, &circle).1.select().is_ok());
        let hole = kernel(BUILT_IN, &[("ext4.ko", "depends=lost\0")]).1.select().unwrap_err().to_string();
        assert!(hole.contains("ext4") && hole.contains("lost"), "{hole}");
        assert!(matches!(kernel("", &[]).1.select(), Err(Flaw::NoDriver(_))));
        assert!(
            matches!(kernel("virtio_pci.ko\n", &[]).1.select(), Err(Flaw::NoDriver(what)) if what.contains("disks"))
        );
        let rootless = "virtio_pci.ko\nvirtio_blk.ko\n";
        assert!(matches!(kernel(rootless, &[]).1.select(), Err(Flaw::NoDriver(what)) if what.contains("root")));
    }

    #[test]
    fn compressed_modules() {
        let plain = module(b"depends=\0");
        let dir = tempfile::tempdir().unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &plain).unwrap();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
        std::io::Write::write_all(&mut xz, &plain).unwrap();
        for (name, bytes) in
            [("a.ko", plain.clone()), ("b.ko.gz", gzip.finish().unwrap()), ("c.ko.xz", xz.finish().unwrap())]
        {
            fs::write(dir.path().join(name), &bytes).unwrap();
            assert!(read(&dir.path().join(name)).unwrap() == plain, "{name}");
            fs::write(dir.path().join(name), &bytes[..bytes.len() / 2]).unwrap();
            assert!(name == "a.ko" || read(&dir.path().join(name)).is_err(), "{name}, cut");
        }
        fs::write(dir.path().join("d.ko.lz4"), "x").unwrap();
        assert!(read(&dir.path().join("d.ko.lz4")).unwrap_err().to_string().contains(".lz4"));
    }
}
