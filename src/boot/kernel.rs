//! Which form of a kernel file is booted: an ELF as it is, a bzImage as the ELF inside it, and if that cannot be
//! had, by the bzImage's own entry.

use std::fs::{File, Metadata};
use std::os::unix::fs::FileExt;

use super::bzimage::SetupHeader;
use super::elf;
use super::error::{Flaw, KernelError};
use super::image::Image;
use super::payload::{self, UnpackError};
use super::{BootFile, regular};
use crate::backend::KernelCache;
use crate::backend::kernel_cache::{Key, UnpackedKernels};

/// Bytes read at first: the setup header, or an ELF header and its program headers.
const HEAD: u64 = 4096;

/// A kernel file whose kind is known.
pub struct Kernel<'a> {
    source: &'a BootFile,
    metadata: Metadata,
    head: Vec<u8>,
    /// `None` for an ELF.
    pub header: Option<SetupHeader>,
}

/// A kernel that can be loaded, and the file its spans are parts of.
pub struct Loadable {
    pub image: Image,
    /// `None`: the file that the user named.
    pub unpacked: Option<File>,
}

impl<'a> Kernel<'a> {
    pub fn identify(source: &'a BootFile) -> Result<Self, KernelError> {
        let metadata = regular(&source.file)?;
        let head = head(&source.file, metadata.len())?;
        let header = match SetupHeader::parse(&head) {
            _ if head.starts_with(&elf::MAGIC) => None,
            Some(header) => Some(header?),
            None => return Err(Flaw::UnknownFormat.into()),
        };
        Ok(Self { source, metadata, head, header })
    }

    /// Finds out what to load; this is where a bzImage is unpacked, unless `cache` has it.
    pub fn resolve(&self, cache: &KernelCache) -> Result<Loadable, KernelError> {
        let (file, size) = (&self.source.file, self.metadata.len());
        let Some(header) = &self.header else {
            return Ok(Loadable { image: elf::parse(file, &self.head, size)?, unpacked: None });
        };
        let problem = match self.unpacked(header, cache) {
            Ok((file, image)) => return Ok(Loadable { image, unpacked: Some(file) }),
            Err(KernelError::Flaw(Flaw::Payload(problem))) => problem,
            Err(other) => return Err(other),
        };
        let Some(image) = header.as_image(size) else { return Err(Flaw::Payload(problem).into()) };
        let cause = std::error::Error::source(&problem).map(|cause| format!(": {cause}")).unwrap_or_default();
        tracing::warn!(
            kernel = %self.source.path.display(),
            "the kernel has to unpack itself, which takes longer: {problem}{cause}"
        );
        Ok(Loadable { image, unpacked: None })
    }

    fn unpacked(&self, header: &SetupHeader, cache: &KernelCache) -> Result<(File, Image), KernelError> {
        let store = cache.open();
        // A file of the cache that is no kernel is passed over here, and replaced below.
        let usable = |(file, size)| inner_image(&file, size).ok().map(|image| (file, image));
        if let Some(found) = store.as_ref().and_then(|store| store.find_by_file(&self.source.file)).and_then(usable) {
            return Ok(found);
        }
        let payload = header.read_payload(&self.source.file, self.metadata.len())?;
        let key = Key::of(&payload);
        let remember = |store: &dyn UnpackedKernels| store.remember(&self.source.file, &key);
        if let Some(found) = store.as_ref().and_then(|store| store.find(&key)).and_then(usable) {
            if let Some(store) = &store {
                remember(&**store);
            }
            return Ok(found);
        }
        let (file, size) = payload::unpack(&payload).map_err(Flaw::Payload)?;
        let image = inner_image(&file, size)?;
        if let Some(store) = &store
            && store.insert(&key, &file)
        {
            remember(&**store);
        }
        Ok((file, image))
    }
}

/// Reads an unpacked payload's headers. Its flaws are the payload's: the bzImage may boot nevertheless.
fn inner_image(file: &File, size: u64) -> Result<Image, KernelError> {
    elf::parse(file, &head(file, size)?, size).map_err(|error| match error {
        KernelError::Flaw(flaw) => Flaw::Payload(UnpackError::Content(Box::new(flaw))).into(),
        other => other,
    })
}

fn head(file: &File, size: u64) -> std::io::Result<Vec<u8>> {
    let mut head = vec![0; size.min(HEAD) as usize];
    file.read_exact_at(&mut head, 0)?;
    Ok(head)
}
