//! Counts anew which clusters of an image are in use.
//!
//! While an image is written to, its reference counts in the file lag behind its tables. When the process is
//! killed or the host loses power meanwhile, the image's dirty bit stays set, and whoever opens it next has to
//! do this first; QEMU does the same.
//!
//! The new counts go behind the end of the file and are pointed to last, so that this may be cut short itself.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::header::{Header, ImageError, read_padded, set_refcount_table};

/// The most clusters that we count: 4 TiB of an image with the usual 64 KiB, in 128 MiB of memory.
const MAX_CLUSTERS: u64 = 1 << 26;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// Are the counts' tables such that they can be worked with? Blocks of counts have to be in the file, each a place of
/// its own, and to cover the image from its start on without a gap: in a gap, imago would look for room for the block
/// that is missing in just that block.
pub fn counts_are_sound(file: &File, file_size: u64, header: &Header) -> Result<bool, ImageError> {
    let cluster = header.cluster_size();
    let table = read_padded(file, header.refcount_offset, header.refcount_clusters as usize * cluster as usize)?;
    let entries = table.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().expect("eight bytes")));
    let entries: Vec<u64> = entries.collect();
    let count = entries.iter().position(|&entry| entry == 0).unwrap_or(entries.len());
    let (blocks, rest) = entries.split_at(count);
    let mut places = blocks.to_vec();
    places.sort_unstable();
    places.dedup();
    let in_file = |&at: &u64| at >= cluster && at.is_multiple_of(cluster) && at < file_size;
    Ok(count > 0 && places.len() == count && places.iter().all(in_file) && rest.iter().all(|&entry| entry == 0))
}

/// Writes new reference counts for the image, which nobody else uses and which has no snapshots.
///
/// # Errors
/// If its tables contradict each other, which nobody can mend without a choice.
pub fn rebuild_refcounts(file: &File, file_size: u64, header: &Header) -> Result<(), ImageError> {
    let cluster = header.cluster_size();
    let mut uses = Uses { counts: Vec::new(), bits: header.cluster_bits };
    uses.add(0, 1)?;
    uses.add(header.l1_offset, (u64::from(header.l1_entries) * 8).div_ceil(cluster))?;
    for table in header.l2_tables(file)? {
        uses.add(table, 1)?;
        for entry in read_padded(file, table, cluster as usize)?.chunks_exact(8) {
            let entry = u64::from_be_bytes(entry.try_into().expect("eight bytes"));
            if entry & COMPRESSED != 0 {
                let (at, len) = compressed(entry, header.cluster_bits);
                uses.add_shared(at, len)?;
            } else if entry & OFFSET != 0 {
                if !(entry & OFFSET).is_multiple_of(cluster) {
                    return Err(ImageError::Damaged("an entry of an L2 table makes no sense"));
                }
                uses.add(entry & OFFSET, 1)?;
            }
        }
    }
    write_counts(file, file_size, header, uses.counts)
}

/// Where a compressed cluster's data is, and how many bytes at most.
fn compressed(entry: u64, cluster_bits: u32) -> (u64, u64) {
    let offset_bits = 62 - (cluster_bits - 8);
    let descriptor = entry & (COMPRESSED - 1);
    let at = descriptor & ((1 << offset_bits) - 1) & ((1 << 56) - 1);
    (at, ((descriptor >> offset_bits) + 1) * 512 - at % 512)
}

struct Uses {
    counts: Vec<u16>,
    bits: u32,
}

impl Uses {
    /// Clusters that have one user.
    fn add(&mut self, offset: u64, clusters: u64) -> Result<(), ImageError> {
        for index in (offset >> self.bits)..(offset >> self.bits) + clusters {
            let count = self.count(index)?;
            if *count != 0 {
                return Err(ImageError::Damaged("a cluster is used twice"));
            }
            *count = 1;
        }
        Ok(())
    }

    /// Clusters whose parts have a user each.
    fn add_shared(&mut self, offset: u64, bytes: u64) -> Result<(), ImageError> {
        for index in offset >> self.bits..=(offset + bytes - 1) >> self.bits {
            let count = self.count(index)?;
            *count = count.checked_add(1).ok_or(ImageError::Damaged("a cluster is used too often"))?;
        }
        Ok(())
    }

    fn count(&mut self, index: u64) -> Result<&mut u16, ImageError> {
        if index >= MAX_CLUSTERS {
            return Err(ImageError::Damaged("it is too large to count its clusters, or a table points too far"));
        }
        let index = index as usize;
        if index >= self.counts.len() {
            self.counts.resize(index + 1, 0);
        }
        Ok(&mut self.counts[index])
    }
}

fn write_counts(file: &File, file_size: u64, header: &Header, mut counts: Vec<u16>) -> Result<(), ImageError> {
    let cluster = header.cluster_size();
    // All of it goes behind what is in use and behind the old counts, which stay valid until the end.
    let first = (counts.len() as u64).max(file_size.div_ceil(cluster));
    let per_block = (cluster * 8) >> header.refcount_order;
    let (mut blocks, mut tables) = (0, 0);
    loop {
        let total = first + tables + blocks;
        let wanted = (total.div_ceil(per_block), (total.div_ceil(per_block) * 8).div_ceil(cluster));
        if wanted == (blocks, tables) {
            break;
        }
        (blocks, tables) = wanted;
    }
    let total = first + tables + blocks;
    if total > MAX_CLUSTERS + (1 << 20) {
        return Err(ImageError::Damaged("it is too large to count its clusters"));
    }
    counts.resize(first as usize, 0);
    counts.resize(total as usize, 1);
    let table: Vec<u8> = (0..blocks).flat_map(|n| ((first + tables + n) * cluster).to_be_bytes()).collect();
    let mut padded = table;
    padded.resize((tables * cluster) as usize, 0);
    file.write_all_at(&padded, first * cluster)?;
    for (counts, n) in counts.chunks(per_block as usize).zip(0..) {
        let mut block = vec![0; cluster as usize];
        for (index, &count) in counts.iter().enumerate() {
            put(&mut block, index, header.refcount_order, count)?;
        }
        file.write_all_at(&block, (first + tables + n) * cluster)?;
    }
    file.sync_data()?;
    let clusters = u32::try_from(tables).map_err(|_| ImageError::Damaged("it is too large"))?;
    Ok(set_refcount_table(file, first * cluster, clusters)?)
}

/// Enters a count of `1 << order` bits; those below a byte are filled in from the low bits on.
fn put(block: &mut [u8], index: usize, order: u32, count: u16) -> Result<(), ImageError> {
    if order < 4 && count >> (1 << order) != 0 {
        return Err(ImageError::Damaged("a cluster is used more often than its count can say"));
    }
    if order < 3 {
        let bit = index << order;
        block[bit / 8] |= (count as u8) << (bit % 8);
    } else {
        let bytes = 1 << (order - 3);
        let wide = u64::from(count).to_be_bytes();
        block[index * bytes..][..bytes].copy_from_slice(&wide[8 - bytes..]);
    }
    Ok(())
}
