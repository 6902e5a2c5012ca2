//! The DAX window: shared memory region 0, and which parts of it hold a part of a file.
//!
//! VIRTIO 1.2, section 5.11.6.4. The guest chooses the places and asks for them with FUSE_SETUPMAPPING and
//! FUSE_REMOVEMAPPING; the front-end makes them (vhost-user SHMEM_MAP, SHMEM_UNMAP). It refuses a mapping
//! over another, and unmaps one whole mapping at a time, so what is mapped is kept here. Called by
//! [`super::passthrough`] on the threads that answer requests.
//!
//! Between the unmapping of one mapping and the making of another in its place there is a hole, in which a
//! guest's other threads read all-ones. So what is mapped already as it should be stays.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};

use crate::requests::{Complaints, lock, refusal};

/// VIRTIO_FS_SHMCAP_ID_CACHE.
const SHMID: u8 = 0;
pub const PAGE: u64 = 4096;

/// A part of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The file's node id.
    pub node: u64,
    pub file_offset: u64,
    pub len: u64,
    pub writable: bool,
}

/// The window of one front-end.
pub struct Window {
    size: u64,
    /// Our requests to the front-end. Held only to copy the handle.
    channel: Mutex<Option<Backend>>,
    /// By offset in the window: neither empty nor overlapping. Held while the front-end's answer is awaited,
    /// so that no two requests of the guest mix; the main socket's thread takes it only when no request is
    /// being answered. `channel` is inside.
    mappings: Mutex<BTreeMap<u64, Mapping>>,
    complaints: Arc<Complaints>,
}

impl Window {
    /// An empty window of `size` bytes.
    pub fn new(size: u64, complaints: Arc<Complaints>) -> Self {
        Window { size, channel: Mutex::new(None), mappings: Mutex::default(), complaints }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where to ask the front-end.
    pub fn connect(&self, channel: Backend) {
        *lock(&self.channel) = Some(channel);
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

    /// Maps a part of `file` at `offset` of the window, in place of whatever lies in there.
    ///
    /// # Errors
    ///
    /// EINVAL for a range that is empty, not made of pages, not inside the window, or that cuts a mapping in
    /// two: the guest believes in all of it. EIO when the front-end refuses; the range is then empty.
    pub fn map(&self, offset: u64, mapping: Mapping, file: &File) -> io::Result<()> {
        let Mapping { file_offset, len, .. } = mapping;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        let in_file = file_offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok());
        let pages = [offset, len, file_offset].iter().all(|number| number % PAGE == 0);
        if len == 0 || !inside || !in_file || !pages {
            return Err(invalid());
        }
        let mut mappings = lock(&self.mappings);
        if mappings.get(&offset) == Some(&mapping) {
            return Ok(());
        }
        self.remove_from(&mut mappings, offset, offset + len)?;

        let flags = if mapping.writable { VhostUserMMapFlags::WRITABLE } else { VhostUserMMapFlags::empty() };
        let request = VhostUserMMap { flags: flags.bits(), fd_offset: file_offset, ..range(offset, len) };
        self.ask("SHMEM_MAP", offset, len, |channel| channel.shmem_map(&request, file))?;
        mappings.insert(offset, mapping);
        Ok(())
    }

    /// Unmaps what lies in a range. One without a mapping is fine, and so is one that reaches beyond the
    /// window: a guest removes everything with a length of ~0.
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
            return Err(invalid());
        }
        while let Some((&offset, _)) = mappings.range(start..end).next() {
            if let Some(mapping) = mappings.remove(&offset) {
                self.unmap(offset, mapping.len);
            }
        }
        Ok(())
    }

    /// A refusal means that the front-end has no such mapping (any more), which is what is wanted.
    fn unmap(&self, offset: u64, len: u64) {
        let _ = self.ask("SHMEM_UNMAP", offset, len, |channel| channel.shmem_unmap(&range(offset, len)));
    }

    /// One request, and the front-end's answer.
    fn ask(
        &self,
        what: &str,
        offset: u64,
        len: u64,
        send: impl FnOnce(&Backend) -> io::Result<u64>,
    ) -> io::Result<()> {
        let channel = lock(&self.channel).clone();
        let why = match channel.as_ref().map(send) {
            Some(Ok(_)) => return Ok(()),
            Some(Err(e)) => refusal(&e),
            None => "the front-end gave no back-end channel".to_owned(),
        };
        self.complaints
            .say(format_args!("{what} of region {SHMID}, offset {offset:#x}, {len:#x} bytes, failed: {why}"));
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

fn range(offset: u64, len: u64) -> VhostUserMMap {
    VhostUserMMap { shmid: SHMID, shm_offset: offset, len, ..Default::default() }
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}
