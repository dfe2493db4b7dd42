//! What a named VM is: the file that its next start takes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{ConfigError, JailLevel, MemorySize, Share, VmConfig};

/// A definition. Newer releases read what older ones wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Definition {
    /// Of this file's format.
    pub version: u32,
    /// What the guest writes to its console when it is up. Without it, it is up when it drives its root disk.
    pub ready: Option<String>,
    /// Sizes that disks get before the next start, by their ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disk_sizes: BTreeMap<String, MemorySize>,
    /// The disk that is getting its size just now, or was when somebody was killed at that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resizing: Option<String>,
    #[serde(default)]
    pub jail: JailLevel,
    #[serde(default, skip_serializing_if = "Share::is_whole")]
    pub share: Share,
    /// Its kernel is a path, or the name of an imported one.
    pub vm: VmConfig,
}

#[derive(Debug, Error)]
pub enum DefinitionError {
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error(transparent)]
    Syntax(#[from] serde_json::Error),
    #[error("it has version {0}, this release knows {version}", version = Definition::VERSION)]
    Version(u32),
    #[error("it describes a VM for Firecracker, whose files 'tranche vmm --config' takes")]
    Firecracker,
    #[error("a path in it is relative: {}", .0.display())]
    RelativePath(PathBuf),
    #[error("a disk in it has no id: give each one of its own")]
    NoDiskId,
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl Definition {
    pub const VERSION: u32 = 1;

    #[must_use]
    pub fn new(vm: VmConfig) -> Self {
        Self {
            version: Self::VERSION,
            ready: None,
            disk_sizes: BTreeMap::new(),
            resizing: None,
            jail: JailLevel::default(),
            share: Share::default(),
            vm,
        }
    }

    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, DefinitionError> {
        /// Its version first: of a later one nothing else may be as it is here.
        #[derive(Deserialize)]
        struct Head {
            version: Option<u32>,
            #[serde(rename = "boot-source")]
            boot_source: Option<serde::de::IgnoredAny>,
        }
        let head: Head = serde_json::from_slice(text)?;
        if head.boot_source.is_some() {
            return Err(DefinitionError::Firecracker);
        }
        if let Some(version) = head.version.filter(|&version| version != Self::VERSION) {
            return Err(DefinitionError::Version(version));
        }
        Ok(serde_json::from_slice(text)?)
    }

    /// Checks what no single value can know by itself.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn validate(&self) -> Result<(), DefinitionError> {
        self.vm.validate()?;
        self.share.validate()?;
        if self.vm.disks.iter().any(|disk| disk.id.is_none()) {
            return Err(DefinitionError::NoDiskId);
        }
        match self.paths().find(|path| path.is_relative()) {
            Some(path) => Err(DefinitionError::RelativePath(path.clone())),
            None => Ok(()),
        }
    }

    /// Would a start now be of something else than what `running` was started with?
    #[must_use]
    pub fn differs_from(&self, running: &Self) -> bool {
        self.vm != running.vm || self.jail != running.jail || self.share != running.share || !self.disk_sizes.is_empty()
    }

    /// The files that it names, but for an imported kernel.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let vm = &self.vm;
        let kernel = (!is_kernel_name(&vm.kernel)).then_some(&vm.kernel);
        kernel.into_iter().chain(&vm.initrd).chain(self.disk_paths())
    }

    /// The files of its disks.
    pub fn disk_paths(&self) -> impl Iterator<Item = &PathBuf> {
        let disks = self.vm.disks.iter();
        disks.flat_map(|disk| {
            let backing = disk.image.backing.iter().map(|backing| &backing.path);
            std::iter::once(&disk.path).chain(backing)
        })
    }

    /// Gives disks without an id one, by which they are known from then on, and has paths begin at `base`.
    ///
    /// # Errors
    /// When a path is empty, or `base` is relative and the current directory cannot be told.
    pub fn settle(&mut self, base: &Path) -> io::Result<()> {
        let settle = |path: &mut PathBuf| -> io::Result<()> {
            *path = std::path::absolute(base.join(&*path))?;
            Ok(())
        };
        let vm = &mut self.vm;
        if !is_kernel_name(&vm.kernel) {
            settle(&mut vm.kernel)?;
        }
        vm.initrd.as_mut().map_or(Ok(()), settle)?;
        for disk in &mut vm.disks {
            settle(&mut disk.path)?;
            disk.image.backing.iter_mut().try_for_each(|backing| settle(&mut backing.path))?;
        }
        for index in 0..self.vm.disks.len() {
            if self.vm.disks[index].id.is_none() {
                let id = self.free_disk_id(index);
                self.vm.disks[index].id = Some(id);
            }
        }
        Ok(())
    }

    /// An id that no disk has: of the root disk `root`, of others a number.
    #[must_use]
    pub fn free_disk_id(&self, index: usize) -> String {
        let disks = &self.vm.disks;
        let is_free = |id: &String| disks.iter().all(|disk| disk.id.as_ref() != Some(id));
        let root = disks.get(index).filter(|disk| disk.root).map(|_| String::from("root"));
        let numbered = (index..).map(|number| format!("disk{number}"));
        root.into_iter().chain(numbered).find(is_free).unwrap_or_default()
    }

    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }
}

/// Does `--kernel` name an imported one? A word without a slash does.
#[must_use]
pub fn is_kernel_name(kernel: &Path) -> bool {
    !kernel.as_os_str().as_encoded_bytes().contains(&b'/')
}
