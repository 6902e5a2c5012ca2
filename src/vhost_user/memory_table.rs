//! Guest RAM as a back-end is told of it (vhost-user "Memory region description").
//!
//! Mappings in shared memory regions are never in it (SHM-79): their owner has the file already.

use std::fs::File;
use std::sync::Arc;

use super::wire::message::MemoryRegion;

/// Guest RAM: ranges of one file.
#[derive(Clone, Debug)]
pub struct MemoryTable {
    /// The file that all regions are in.
    pub file: Arc<File>,
    /// At most 8, the most that SET_MEM_TABLE can carry; x86-64 needs two.
    pub regions: Vec<MemoryRegion>,
}

impl MemoryTable {
    /// The address that a back-end is to be given for `len` bytes at a guest physical address; `None` where
    /// those are not all in one region.
    pub fn user_address(&self, guest_addr: u64, len: u64) -> Option<u64> {
        self.find(guest_addr, len).map(|(region, offset)| region.user_addr + offset)
    }

    /// Where `len` bytes at a guest physical address are in the file; `None` as above.
    pub fn file_offset(&self, guest_addr: u64, len: u64) -> Option<u64> {
        self.find(guest_addr, len).map(|(region, offset)| region.mmap_offset + offset)
    }

    /// The region that all of a range is in, and the offset there.
    fn find(&self, guest_addr: u64, len: u64) -> Option<(&MemoryRegion, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = guest_addr.checked_sub(region.guest_addr)?;
            let inside = offset.checked_add(len)? <= region.size;
            inside.then_some((region, offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_given_only_for_what_is_all_in_one_region() {
        let region = |guest_addr, size, user_addr| {
            let mmap_offset = guest_addr / 2;
            MemoryRegion { guest_addr, size, user_addr, mmap_offset }
        };
        let file = Arc::new(tempfile::tempfile().unwrap());
        let regions = vec![region(0, 0x8000, 0x10_0000), region(0x1_0000, 0x1000, 0x20_0000)];
        let table = MemoryTable { file, regions };
        assert_eq!(table.file_offset(0x1_0ff0, 0x10), Some(0x8ff0));
        for (address, len, expected) in [
            (0, 0x8000, Some(0x10_0000)),
            (0x7fff, 1, Some(0x10_7fff)),
            (0x1_0ff0, 0x10, Some(0x20_0ff0)),
            (0x7fff, 2, None),
            (0x8000, 1, None),
            (0xffff, 2, None),
            (0x1_0ff0, 0x11, None),
            (u64::MAX, 1, None),
            (0x10, u64::MAX, None),
        ] {
            assert_eq!(table.user_address(address, len), expected, "{address:#x} {len:#x}");
            assert_eq!(table.file_offset(address, len).is_some(), expected.is_some());
        }
    }
}
