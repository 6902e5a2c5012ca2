//! The DAX window: shared memory region 0 (VIRTIO_FS_SHMCAP_ID_CACHE), and which parts of it hold a part of a
//! file.
//!
//! VIRTIO 1.2, section 5.11.6.4. The guest chooses the offsets and asks for mappings with FUSE_SETUPMAPPING
//! and FUSE_REMOVEMAPPING; the front-end makes them (vhost-user SHMEM_MAP, SHMEM_UNMAP). It refuses a mapping
//! over another, and unmaps one whole mapping at a time, so the mappings are recorded here. Called by
//! [`super::passthrough`] on the threads that answer requests.
//!
//! Between an UNMAP and the MAP of another file in its place there is a hole, in which the guest's other
//! threads read all-ones. So a mapping that is as the guest asks already stays.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use vhost::vhost_user::Backend;

use super::change::{Change, Mapping};
use super::journal::Keeper;
use crate::channel::Channel;
use crate::complaints::Complaints;
use crate::lock::lock;

pub const PAGE: u64 = 4096;

/// The window of one front-end.
pub struct Window {
    size: u64,
    channel: Channel,
    /// By offset in the window: neither empty nor overlapping. Held while the front-end's answer is awaited,
    /// so that no two requests of the guest mix; the main socket's thread takes it only when no request is
    /// being answered. Lock order: before `channel`'s.
    mappings: Mutex<BTreeMap<u64, Mapping>>,
    keeper: Keeper,
    complaints: Arc<Complaints>,
}

impl Window {
    /// An empty window of `size` bytes.
    pub fn new(size: u64, keeper: Keeper, complaints: Arc<Complaints>) -> Self {
        Window { size, channel: Channel::default(), mappings: Mutex::default(), keeper, complaints }
    }

    /// What the guest of the last session has mapped is mapped again. `begun` is called once no other
    /// request can come between; `open` opens a file for that. A front-end that refuses has it mapped
    /// still. Where the file is not found, the mapping of the last session is removed: the front-end may
    /// keep it until then.
    pub fn restore(
        &self,
        kept: &BTreeMap<u64, Mapping>,
        begun: impl FnOnce(),
        open: impl Fn(&Mapping) -> io::Result<File>,
    ) {
        let mut mappings = lock(&self.mappings);
        begun();
        for (&offset, mapping) in kept {
            let Mapping { file_offset, len, writable, .. } = *mapping;
            match open(mapping) {
                Ok(file) => {
                    if let Err(e) = self.channel.map(offset, len, (&file, file_offset), writable) {
                        self.complaints.say(e);
                    }
                    mappings.insert(offset, *mapping);
                }
                Err(e) => {
                    self.complaints
                        .say(format_args!("the file at {offset:#x} of the window is not found again: {e}"));
                    self.unmap(offset, len);
                }
            }
        }
        // The next process must not look for the mappings whose files were not found.
        self.keeper.commit(|| None);
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn connect(&self, backend: Backend) {
        self.channel.connect(backend);
    }

    /// The front-end has removed all mappings (a device reset).
    pub fn forget(&self) {
        lock(&self.mappings).clear();
    }

    /// Removes all mappings.
    pub fn empty(&self) {
        let mut mappings = lock(&self.mappings);
        while let Some((offset, mapping)) = mappings.pop_first() {
            self.unmap(offset, mapping.len);
        }
    }

    /// Maps a part of `file` at `offset` of the window, in place of the mappings in that range.
    ///
    /// # Errors
    ///
    /// EINVAL for a range that is empty, not made of pages, not inside the window, or that cuts a mapping in
    /// two, of which the guest may use the rest. EIO if the front-end refuses; the range is then empty.
    pub fn map(&self, offset: u64, mapping: Mapping, file: &File) -> io::Result<()> {
        let Mapping { file_offset, len, .. } = mapping;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        let in_file = file_offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok());
        let pages = [offset, len, file_offset].iter().all(|number| number % PAGE == 0);
        if len == 0 || !inside || !in_file || !pages {
            return Err(Errno::INVAL.into());
        }
        let mut mappings = lock(&self.mappings);
        if mappings.get(&offset) == Some(&mapping) {
            return Ok(());
        }
        self.remove_from(&mut mappings, offset, offset + len)?;

        self.channel.map(offset, len, (file, file_offset), mapping.writable).map_err(|e| {
            self.complaints.say(e);
            io::Error::from(Errno::IO)
        })?;
        self.keeper.note(|| Change::Mapped { offset, mapping });
        mappings.insert(offset, mapping);
        Ok(())
    }

    /// What is mapped in a range, as parts of files; `None` where it has a hole or leaves the window.
    pub fn parts(&self, offset: u64, len: u64) -> Option<Vec<Mapping>> {
        let end = offset.checked_add(len)?;
        let mappings = lock(&self.mappings);
        let mut parts = Vec::new();
        let mut at = offset;
        while at < end {
            let (start, mapping) = mappings.range(..=at).next_back()?;
            let skipped = at - start;
            let len = mapping.len.checked_sub(skipped).filter(|&len| len > 0)?.min(end - at);
            parts.push(Mapping { file_offset: mapping.file_offset + skipped, len, ..*mapping });
            at += len;
        }
        Some(parts)
    }

    /// Unmaps the mappings in a range. It may hold none, and may reach beyond the window: a guest removes
    /// everything with a length of ~0.
    ///
    /// # Errors
    ///
    /// EINVAL for a range that cuts a mapping in two; nothing is unmapped.
    pub fn remove(&self, offset: u64, len: u64) -> io::Result<()> {
        self.remove_from(&mut lock(&self.mappings), offset, offset.saturating_add(len))
    }

    fn remove_from(&self, mappings: &mut BTreeMap<u64, Mapping>, start: u64, end: u64) -> io::Result<()> {
        let end_of = |(at, mapping): (&u64, &Mapping)| at + mapping.len;
        let reaches_in = mappings.range(..start).next_back().is_some_and(|last| end_of(last) > start);
        let reaches_out = mappings.range(start..end).next_back().is_some_and(|last| end_of(last) > end);
        if reaches_in || reaches_out {
            return Err(Errno::INVAL.into());
        }
        while let Some((&offset, _)) = mappings.range(start..end).next() {
            if let Some(mapping) = mappings.remove(&offset) {
                self.unmap(offset, mapping.len);
            }
        }
        Ok(())
    }

    /// If the front-end refuses, it has no such mapping: the range is unmapped all the same.
    fn unmap(&self, offset: u64, len: u64) {
        self.keeper.note(|| Change::Unmapped(offset));
        if let Err(e) = self.channel.unmap(offset, len) {
            self.complaints.say(e);
        }
    }
}
