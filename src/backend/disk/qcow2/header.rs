//! The header of a qcow2 image ("Qcow2 Image File Format" in QEMU's docs/interop), checked before anything acts
//! on what it says: an image may come from anywhere.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Where the header has its incompatible features (version 3).
const INCOMPATIBLE: u64 = 72;
const REFCOUNT_TABLE: u64 = 48;

/// Bit 0 of the incompatible features: reference counts may be wrong.
const DIRTY: u64 = 1;
/// The others that have a name.
const FEATURES: [(u64, &str); 4] = [
    (1 << 1, "it is marked corrupt"),
    (1 << 2, "its data is in another file"),
    (1 << 3, "its clusters are compressed by something else than zlib"),
    (1 << 4, "it has extended L2 entries (subclusters)"),
];

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME: usize = 48;

/// The largest tables, in bytes; QEMU's limits too.
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// What is wrong with an image.
#[derive(Debug, Error)]
pub enum ImageError {
    #[error("it does not begin like a qcow2 image")]
    NotQcow2,
    #[error("it is of version {0} of qcow2; 2 and 3 are known")]
    Version(u32),
    #[error("it is encrypted")]
    Encrypted,
    #[error("{0}, which is not supported")]
    Feature(&'static str),
    #[error("it has the unknown feature {0}")]
    UnknownFeature(u32),
    #[error("it was not closed cleanly")]
    Dirty,
    #[error("it can be read only: {0}")]
    ReadOnly(&'static str),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("reading or writing it failed")]
    Io(#[from] io::Error),
}

/// What a valid header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// The disk's size in bytes.
    pub size: u64,
    pub l1_offset: u64,
    pub l1_entries: u32,
    pub refcount_offset: u64,
    pub refcount_clusters: u32,
    pub refcount_order: u32,
    pub snapshots: u32,
    pub dirty: bool,
    /// Features that a writer has to know or to give up.
    pub autoclear: bool,
    /// The name that the image has for its backing file, and that file's format.
    pub backing: Option<String>,
    pub backing_format: Option<String>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Reads up to `len` bytes from `offset` on; what lies behind the end of the file is zeroes, as the format has it.
pub fn read_padded(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// Does the file begin as qcow2 images do?
pub fn looks_like_qcow2(file: &File) -> io::Result<bool> {
    Ok(read_padded(file, 0, MAGIC.len())? == MAGIC)
}

impl Header {
    /// Reads the header of an image of `file_size` bytes, and its L1 table, and checks both.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn read(file: &File, file_size: u64) -> Result<Self, ImageError> {
        let start = read_padded(file, 0, 104)?;
        if start[..4] != MAGIC {
            return Err(ImageError::NotQcow2);
        }
        let cluster_bits = be32(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(ImageError::Damaged("its cluster size is not 512 bytes to 2 MiB"));
        }
        let header = Self::parse(&read_padded(file, 0, 1 << cluster_bits)?, file_size)?;
        header.check_l1(file, file_size)?;
        Ok(header)
    }

    /// Checks the first cluster, whose size has been checked.
    fn parse(cluster: &[u8], file_size: u64) -> Result<Self, ImageError> {
        use ImageError::Damaged;
        let version = be32(cluster, 4);
        if ![2, 3].contains(&version) {
            return Err(ImageError::Version(version));
        }
        let mut header = Self {
            version,
            cluster_bits: be32(cluster, 20),
            size: be64(cluster, 24),
            l1_entries: be32(cluster, 36),
            l1_offset: be64(cluster, 40),
            refcount_offset: be64(cluster, REFCOUNT_TABLE as usize),
            refcount_clusters: be32(cluster, 56),
            snapshots: be32(cluster, 60),
            refcount_order: 4,
            dirty: false,
            autoclear: false,
            backing: None,
            backing_format: None,
        };
        if be32(cluster, 32) != 0 {
            return Err(ImageError::Encrypted);
        }
        if version == 3 {
            header.read_version_3(cluster)?;
        }
        header.backing = backing_name(cluster)?;
        let aligned = |offset: u64| offset != 0 && offset.is_multiple_of(header.cluster_size());
        // The clusters that one L2 table names, and the bytes of the disk they hold.
        let per_l1_entry = header.cluster_size() * (header.cluster_size() / 8);
        if u64::from(header.l1_entries) * 8 > MAX_L1 || header.size.div_ceil(per_l1_entry) > header.l1_entries.into() {
            return Err(Damaged("its size and its L1 table do not fit each other"));
        }
        let in_file = |offset: u64, len: u64| offset.checked_add(len).is_some_and(|end| end <= file_size);
        if header.l1_entries > 0
            && !(aligned(header.l1_offset) && in_file(header.l1_offset, u64::from(header.l1_entries) * 8))
        {
            return Err(Damaged("its L1 table is not where it should be; is the file cut short?"));
        }
        let refcounts = u64::from(header.refcount_clusters) * header.cluster_size();
        if refcounts == 0 || refcounts > MAX_REFCOUNT_TABLE.max(header.cluster_size()) {
            return Err(Damaged("its refcount table has an impossible size"));
        }
        if !(aligned(header.refcount_offset) && in_file(header.refcount_offset, 8)) {
            return Err(Damaged("its refcount table is not where it should be; is the file cut short?"));
        }
        Ok(header)
    }

    fn read_version_3(&mut self, cluster: &[u8]) -> Result<(), ImageError> {
        let features = be64(cluster, INCOMPATIBLE as usize);
        if let Some((_, what)) = FEATURES.into_iter().find(|(bit, _)| features & bit != 0) {
            return Err(ImageError::Feature(what));
        }
        if features & !DIRTY != 0 {
            return Err(ImageError::UnknownFeature((features & !DIRTY).trailing_zeros()));
        }
        self.dirty = features & DIRTY != 0;
        self.autoclear = be64(cluster, 88) != 0;
        self.refcount_order = be32(cluster, 96);
        if self.refcount_order > 6 {
            return Err(ImageError::Damaged("its reference counts have more than 64 bits"));
        }
        let length = be32(cluster, 100) as usize;
        if length < 104 || !length.is_multiple_of(8) || length > cluster.len() {
            return Err(ImageError::Damaged("its header has an impossible length"));
        }
        // Byte 104, if there is one, is the compression type; without the feature it has to be 0, zlib.
        if length > 104 && cluster[104] != 0 {
            return Err(ImageError::Damaged("its compression type has no feature bit"));
        }
        self.read_extensions(&cluster[length..])
    }

    fn read_extensions(&mut self, mut rest: &[u8]) -> Result<(), ImageError> {
        const BROKEN: ImageError = ImageError::Damaged("its header extensions are broken");
        loop {
            if rest.len() < 8 {
                return Err(BROKEN);
            }
            let (kind, len) = (be32(rest, 0), be32(rest, 4) as usize);
            let data = rest[8..].get(..len).ok_or(BROKEN)?;
            match kind {
                EXTENSION_END => return if len == 0 { Ok(()) } else { Err(BROKEN) },
                EXTENSION_BACKING_FORMAT => {
                    let format = String::from_utf8(data.to_vec()).map_err(|_| BROKEN)?;
                    if self.backing_format.replace(format).is_some() {
                        return Err(BROKEN);
                    }
                }
                EXTENSION_FEATURE_NAMES if !len.is_multiple_of(FEATURE_NAME) => return Err(BROKEN),
                _ => {}
            }
            rest = rest.get(8 + len.next_multiple_of(8)..).ok_or(BROKEN)?;
        }
    }

    /// Each L2 table has to lie in the file, and to have one entry that names it.
    fn check_l1(&self, file: &File, file_size: u64) -> Result<(), ImageError> {
        let mut tables = self.l2_tables(file)?;
        let end = file_size.next_multiple_of(self.cluster_size());
        if tables.iter().any(|&at| at < self.cluster_size() || at + self.cluster_size() > end) {
            return Err(ImageError::Damaged("an L2 table is outside of the file; is it cut short?"));
        }
        tables.sort_unstable();
        if self.snapshots == 0 && tables.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(ImageError::Damaged("an L2 table is used twice"));
        }
        Ok(())
    }

    /// Where the L2 tables are that the L1 table names, in its order.
    pub fn l2_tables(&self, file: &File) -> Result<Vec<u64>, ImageError> {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let l1 = read_padded(file, self.l1_offset, self.l1_entries as usize * 8)?;
        let mut tables = Vec::new();
        for entry in l1.chunks_exact(8).map(|entry| be64(entry, 0)) {
            if entry & !(OFFSET | 1 << 63) != 0 || !(entry & OFFSET).is_multiple_of(self.cluster_size()) {
                return Err(ImageError::Damaged("an entry of its L1 table makes no sense"));
            }
            if entry & OFFSET != 0 {
                tables.push(entry & OFFSET);
            }
        }
        Ok(tables)
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// May we write to the image?
    ///
    /// # Errors
    /// The reason why not.
    pub fn check_writable(&self) -> Result<(), ImageError> {
        match () {
            () if self.version < 3 => Err(ImageError::ReadOnly("version 2 of the format cannot say that it is in use")),
            () if self.snapshots > 0 => Err(ImageError::ReadOnly("it has internal snapshots")),
            () if self.autoclear => Err(ImageError::ReadOnly("it has dirty bitmaps or the like, which would go stale")),
            () => Ok(()),
        }
    }
}

fn backing_name(cluster: &[u8]) -> Result<Option<String>, ImageError> {
    const BROKEN: ImageError = ImageError::Damaged("the name of its backing file is broken");
    let (offset, len) = (be64(cluster, 8), be32(cluster, 16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    let start = usize::try_from(offset).ok().filter(|&start| start < cluster.len()).ok_or(BROKEN)?;
    let name = cluster[start..].get(..len).filter(|name| (1..=1023).contains(&name.len())).ok_or(BROKEN)?;
    String::from_utf8(name.to_vec()).map(Some).map_err(|_| BROKEN)
}

/// Marks the image as in use (reference counts may be wrong), or as closed cleanly, on stable storage.
pub fn set_dirty(file: &File, dirty: bool) -> io::Result<()> {
    let features = if dirty { DIRTY } else { 0 };
    // All other bits are 0, or the image had been refused.
    file.write_all_at(&features.to_be_bytes(), INCOMPATIBLE)?;
    file.sync_data()
}

/// Points the header to another refcount table, on stable storage.
pub fn set_refcount_table(file: &File, offset: u64, clusters: u32) -> io::Result<()> {
    let mut pointer = [0; 12];
    pointer[..8].copy_from_slice(&offset.to_be_bytes());
    pointer[8..].copy_from_slice(&clusters.to_be_bytes());
    file.write_all_at(&pointer, REFCOUNT_TABLE)?;
    file.sync_data()
}
