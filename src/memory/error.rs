//! Why shared memory regions cannot be had, and why a request to map or unmap is refused.

use std::io;

use thiserror::Error;

use super::alloc::NoRoom;
use super::{Access, PAGE_SIZE};

/// Why the regions that a back-end announces cannot be had. Sizes are in bytes.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages say it.
pub enum LayoutError {
    /// SHM-15.
    #[error(
        "shared memory region {shmid} has {size:#x} bytes, which is not a multiple of the page size {PAGE_SIZE:#x}"
    )]
    NotPages { shmid: u8, size: u64 },
    /// SHM-16.
    #[error("shared memory region {shmid} does not fit into the guest's physical address space")]
    NoGuestAddresses { shmid: u8, source: NoRoom },
    #[error("cannot reserve {size:#x} bytes of address space for shared memory region {shmid}")]
    NoHostAddresses { shmid: u8, size: u64, source: io::Error },
}

/// Why a request was refused. Nothing was changed then. Offsets and lengths are in bytes.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages say it.
pub enum ShmemError {
    /// SHM-75: the device was reset and not started since.
    #[error("the device is reset: mappings are refused until it is started again")]
    GateClosed,
    /// SHM-29.
    #[error("there is no shared memory region {0}")]
    NoRegion(u8),
    /// SHM-30.
    #[error("the length is 0")]
    Empty,
    /// SHM-33.
    #[error("the {0} {1:#x} is not a multiple of the page size {PAGE_SIZE:#x}")]
    Unaligned(&'static str, u64),
    /// SHM-31.
    #[error("{len:#x} bytes from {shm_offset:#x} on leave region {shmid}, which has {size:#x} bytes")]
    OutOfBounds { shmid: u8, shm_offset: u64, len: u64, size: u64 },
    /// SHM-32.
    #[error("{len:#x} bytes from {file_offset:#x} on are beyond what a file can have")]
    FileRange { file_offset: u64, len: u64 },
    /// SHM-35; `other` is where the mapping starts that is in the way.
    #[error("{len:#x} bytes from {shm_offset:#x} on overlap the mapping at {other:#x} of region {shmid}")]
    Overlap { shmid: u8, shm_offset: u64, len: u64, other: u64 },
    /// SHM-48.
    #[error("the device has {0} mappings, and may not have more")]
    Quota(usize),
    /// SHM-85.
    #[error(
        "with {len:#x} bytes more than the {mapped:#x} that are mapped the device would have more than its limit of \
         {limit:#x}: shmem-limit=SIZE sets another"
    )]
    Bytes { len: u64, mapped: u64, limit: u64 },
    /// SHM-83.
    #[error(
        "its file is on {0}, where calls may wait for another process or the network without end: foreign-files=on takes \
         such files"
    )]
    Foreign(String),
    /// SHM-51, SHM-52.
    #[error("no mapping of region {shmid} is exactly {len:#x} bytes from {shm_offset:#x} on")]
    NoMapping { shmid: u8, shm_offset: u64, len: u64 },
    /// SHM-41.
    #[error(
        "its descriptor is not open for writing: send one that is open for reading and writing, or a MAP without the flag \
         for writing"
    )]
    NotForWriting,
    /// SHM-47.
    #[error("its descriptor is not open for reading")]
    NotForReading,
    /// SHM-41, SHM-47, SHM-48: the file cannot be mapped, or the addresses for it cannot be had.
    #[error("the file cannot be mapped")]
    Place(#[source] io::Error),
    /// SHM-48: the guest's physical memory could not be changed.
    #[error("the guest's memory cannot be changed")]
    Guest(#[source] io::Error),
}

impl ShmemError {
    /// Why mmap(2) of a file failed.
    pub(super) fn of_mmap(error: io::Error, access: Access) -> Self {
        match (error.raw_os_error(), access) {
            (Some(libc::EACCES), Access::ReadWrite) => ShmemError::NotForWriting,
            (Some(libc::EACCES), Access::ReadOnly) => ShmemError::NotForReading,
            _ => ShmemError::Place(error),
        }
    }

    /// The errno value that a back-end is told (SHM-58): positive, never 0.
    pub fn errno(&self) -> i32 {
        match self {
            ShmemError::GateClosed => libc::EBUSY,
            ShmemError::NoRegion(_) | ShmemError::NoMapping { .. } => libc::ENOENT,
            ShmemError::Empty | ShmemError::Unaligned(..) => libc::EINVAL,
            ShmemError::OutOfBounds { .. } => libc::ERANGE,
            ShmemError::FileRange { .. } => libc::EOVERFLOW,
            ShmemError::Overlap { .. } => libc::EEXIST,
            ShmemError::Quota(_) | ShmemError::Bytes { .. } => libc::ENOSPC,
            ShmemError::Foreign(_) => libc::EPERM,
            ShmemError::NotForWriting | ShmemError::NotForReading => libc::EACCES,
            ShmemError::Place(error) | ShmemError::Guest(error) => {
                error.raw_os_error().filter(|&errno| errno > 0).unwrap_or(libc::EIO)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_names_no_reason_is_no_success() {
        // SHM-58
        for errno in [0, -1] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(ShmemError::Guest(error).errno(), libc::EIO);
        }
        assert_eq!(ShmemError::Place(io::ErrorKind::Other.into()).errno(), libc::EIO);
    }
}
