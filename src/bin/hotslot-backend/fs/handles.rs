//! File handles of the host (name_to_handle_at(2)): names of files that outlive renames, and by which a file
//! is opened without its path.
//!
//! A handle names one file, also after another has got its inode number. To open files by handles, the
//! process needs CAP_DAC_READ_SEARCH, with which it could open every file of that file system: so this is an
//! option. Handles come from files that were found by name in the directory; the guest neither sees nor sends
//! them. Called by [`super`] at the start, and by [`super::inodes`].

#![expect(unsafe_code, reason = "rustix has neither of the two calls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use clap::ValueEnum;
use rustix::fs::{Mode, OFlags};

/// Whether files are opened by handles.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Use {
    /// By names only
    Never,
    /// By handles where names do not help, if this process may and the file system has them
    Prefer,
    /// The same; do not start where that cannot be done
    Mandatory,
}

/// MAX_HANDLE_SZ.
const MAX_BYTES: usize = libc::MAX_HANDLE_SZ as usize;

/// `struct file_handle`, with room for each handle.
#[repr(C)]
struct Raw {
    handle_bytes: u32,
    handle_type: i32,
    f_handle: [u8; MAX_BYTES],
}

/// A file's type of handle and its bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Handle {
    kind: i32,
    bytes: Box<[u8]>,
}

/// What opens the handles of one mount.
pub struct Handles {
    /// Not opened with O_PATH, which the kernel refuses.
    directory: File,
    mount: i32,
}

impl Handles {
    /// For files on the mount of a directory.
    ///
    /// # Errors
    ///
    /// The file system has no handles, or this process may not open them.
    pub fn on_mount_of(directory: &File) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory: File = rustix::fs::openat(directory, c".", flags, Mode::empty())?.into();
        let (handle, mount) = handle_of(&directory)?;
        let handles = Handles { directory, mount };
        handles.open(&handle)?;
        Ok(handles)
    }

    /// The handle of a file; none if it is on another mount, or has none.
    pub fn of(&self, file: &File) -> Option<Handle> {
        let (handle, mount) = handle_of(file).ok()?;
        (mount == self.mount).then_some(handle)
    }

    /// Opens a file with O_PATH.
    ///
    /// # Errors
    ///
    /// ESTALE: it is gone.
    pub fn open(&self, handle: &Handle) -> io::Result<File> {
        let mut raw = Raw { handle_bytes: 0, handle_type: handle.kind, f_handle: [0; MAX_BYTES] };
        raw.handle_bytes = handle.bytes.len() as u32;
        raw.f_handle[..handle.bytes.len()].copy_from_slice(&handle.bytes);
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: `raw` is a `file_handle` with as many bytes as it says; it lives until the call returns.
        let opened =
            unsafe { libc::open_by_handle_at(self.directory.as_raw_fd(), (&raw mut raw).cast(), flags) };
        if opened < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
        Ok(unsafe { File::from_raw_fd(opened) })
    }
}

/// A file's handle, and the id of its mount.
fn handle_of(file: &File) -> io::Result<(Handle, i32)> {
    let mut raw = Raw { handle_bytes: MAX_BYTES as u32, handle_type: 0, f_handle: [0; MAX_BYTES] };
    let mut mount = 0;
    let (handle, flags) = ((&raw mut raw).cast(), libc::AT_EMPTY_PATH);
    // SAFETY: `raw` is a `file_handle` with room for as many bytes as it says; it and `mount` live until the
    // call returns, and so does the name.
    let failed =
        unsafe { libc::name_to_handle_at(file.as_raw_fd(), c"".as_ptr(), handle, &raw mut mount, flags) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = raw.f_handle.get(..raw.handle_bytes as usize).unwrap_or(&raw.f_handle);
    Ok((Handle { kind: raw.handle_type, bytes: bytes.into() }, mount))
}
