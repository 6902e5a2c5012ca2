//! The backend channel of `pmem` and `fs`: their requests to the front-end, all for shared memory region 0
//! (vhost-user, BACKEND_SHMEM_MAP and BACKEND_SHMEM_UNMAP).

use std::fs::File;
use std::io;
use std::sync::Mutex;

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, Error as ProtocolError, VhostUserFrontendReqHandler};

use crate::lock::lock;

const SHMID: u8 = 0;

/// hotslot's protocol feature by which a back-end is told where its regions are (SHM-82).
pub const SHMEM_ADDRESSES: u64 = 1 << 58;

/// Lock order: innermost; held to copy the handle, never while an answer is awaited.
#[derive(Default)]
pub struct Channel(Mutex<Option<Backend>>);

impl Channel {
    /// SET_BACKEND_REQ_FD: from now on requests go there.
    pub fn connect(&self, backend: Backend) {
        *lock(&self.0) = Some(backend);
    }

    /// Has the front-end map `len` bytes of the file, from `file_offset` on, at `offset` of the region. An
    /// error is a sentence for the user.
    pub fn map(
        &self,
        offset: u64,
        len: u64,
        (file, file_offset): (&File, u64),
        writable: bool,
    ) -> Result<(), String> {
        let (flags, access) = match writable {
            true => (VhostUserMMapFlags::WRITABLE, ", read-write"),
            false => (VhostUserMMapFlags::empty(), ", read-only"),
        };
        let range = VhostUserMMap { flags: flags.bits(), fd_offset: file_offset, ..range(offset, len) };
        self.request("SHMEM_MAP", &range, access, |backend| backend.shmem_map(&range, file))
    }

    /// Has the front-end unmap the whole of one mapping. An error is a sentence for the user.
    pub fn unmap(&self, offset: u64, len: u64) -> Result<(), String> {
        let range = range(offset, len);
        self.request("SHMEM_UNMAP", &range, "", |backend| backend.shmem_unmap(&range))
    }

    fn request(
        &self,
        name: &str,
        range: &VhostUserMMap,
        access: &str,
        send: impl FnOnce(&Backend) -> io::Result<u64>,
    ) -> Result<(), String> {
        let backend = lock(&self.0).clone();
        let why = match backend.as_ref().map(send) {
            Some(Ok(_)) => return Ok(()),
            Some(Err(e)) => refusal(&e),
            None => "the front-end gave no backend channel".to_owned(),
        };
        let VhostUserMMap { shm_offset, len, .. } = *range;
        Err(format!(
            "{name} of region {SHMID}, offset {shm_offset:#x}, {len:#x} bytes{access}, failed: {why}"
        ))
    }
}

fn range(offset: u64, len: u64) -> VhostUserMMap {
    VhostUserMMap { shmid: SHMID, shm_offset: offset, len, ..Default::default() }
}

/// Why the front-end did not do it. The crate does not tell the value of the answer.
fn refusal(error: &io::Error) -> String {
    match error.get_ref().and_then(|e| e.downcast_ref::<ProtocolError>()) {
        Some(ProtocolError::FrontendInternalError) => "the front-end refused".to_owned(),
        Some(ProtocolError::PartialMessage) => "the front-end closed the channel".to_owned(),
        _ => error.to_string(),
    }
}
