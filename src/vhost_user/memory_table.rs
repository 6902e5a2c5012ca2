//! Guest RAM as a back-end is told of it (vhost-user "Memory region description").
//!
//! Mappings in shared memory regions are never in it (SHM-79): their owner has the file already.

use std::fs::File;
use std::sync::Arc;

use super::message::MemoryRegion;

/// Guest RAM: ranges of one file.
#[derive(Clone, Debug)]
pub struct MemoryTable {
    file: Arc<File>,
    regions: Vec<MemoryRegion>,
}

impl MemoryTable {
    /// The most regions that SET_MEM_TABLE can carry.
    pub const MAX_REGIONS: usize = 8;

    /// RAM made of these regions of `file`; at most [`Self::MAX_REGIONS`], of which x86-64 needs two.
    pub fn new(file: Arc<File>, regions: Vec<MemoryRegion>) -> Self {
        debug_assert!(regions.len() <= Self::MAX_REGIONS);
        MemoryTable { file, regions }
    }

    /// The file that all regions are in.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The regions.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// The address that a back-end is to be given for `len` bytes at a guest physical address; `None` where those are
    /// not all in one region.
    pub fn user_address(&self, guest_addr: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = guest_addr.checked_sub(region.guest_addr)?;
            let inside = offset.checked_add(len)? <= region.size;
            inside.then(|| region.user_addr + offset)
        })
    }
}
