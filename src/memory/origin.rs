//! Where a file of a back-end lies, and so whether a call on it can wait for another process or the network.
//!
//! Asked without asking the file's own file system, whose server may never answer: F_GET_SEALS works on files
//! of memory and is the kernel's alone; statx(2) with AT_STATX_DONT_SYNC takes the file's device and mount
//! from what the kernel has, and /proc/self/mountinfo says what is mounted there. (9p asks its server all the
//! same. Only root can mount 9p.)
//!
//! `memory::shmem` calls it for each mapping, with no lock held.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, fcntl_get_seals, statx};
use rustix::io::Errno;

use super::error::ShmemError;

/// File systems that need no other process and no network, as mountinfo names them.
///
/// Two are there although something else may be behind them, since only root can mount them here, and a file
/// of a mount that is not ours is not taken for one of them:
///
/// - overlay, the root of a container. Its layers may be on any file system.
/// - virtiofs, in a virtual machine. Its server is the machine's host, as for each of the machine's disks.
const LOCAL: [&str; 20] = [
    "bcachefs",
    "btrfs",
    "erofs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hugetlbfs",
    "iso9660",
    "jfs",
    "nilfs2",
    "overlay",
    "ramfs",
    "rootfs",
    "squashfs",
    "tmpfs",
    "vfat",
    "virtiofs",
    "xfs",
];

/// Device, by its two numbers, and inode.
pub type FileId = (u32, u32, u64);

/// A file that may be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A memfd, or a file of tmpfs or hugetlbfs.
    Memory,
    /// On another file system; without its id where the file's server hides that.
    FileSystem {
        #[allow(missing_docs)] // The type says it.
        id: Option<FileId>,
    },
}

/// What the kernel knows of a file without asking its server.
pub(super) fn look(file: BorrowedFd<'_>, what: StatxFlags) -> rustix::io::Result<Statx> {
    statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, what)
}

pub(super) fn id(found: &Statx) -> FileId {
    (found.stx_dev_major, found.stx_dev_minor, found.stx_ino)
}

/// Which files of a device's back-end are taken.
pub(super) struct Origins {
    /// Also those on which calls can wait for another process (`foreign-files=on`).
    foreign: bool,
    /// Lock order: innermost. Held while /proc/self/mountinfo is read, which is the kernel's alone.
    mounts: Mutex<Mounts>,
}

/// What is mounted here: read when it is first needed, and again when it has changed.
#[derive(Default)]
struct Mounts {
    /// Opened at the start: later no file can be opened where the process is confined. `None` without /proc.
    table: Option<File>,
    is_read: bool,
    /// The type of each mount, by its id.
    by_id: BTreeMap<u64, String>,
    /// The same by the device number, for a file of another mount of the same file system.
    by_device: BTreeMap<(u32, u32), String>,
}

impl Origins {
    /// Takes foreign files, or refuses them.
    pub fn new(foreign: bool) -> Self {
        let table = File::open("/proc/self/mountinfo").ok();
        Origins { foreign, mounts: Mutex::new(Mounts { table, ..Mounts::default() }) }
    }

    /// Looks at a file. Fails with EINVAL for anything but a regular file.
    pub fn of(&self, file: BorrowedFd<'_>) -> Result<Origin, ShmemError> {
        // Only the kernel's own files of memory have seals, and each of them is a regular file.
        if fcntl_get_seals(file).is_ok() {
            return Ok(Origin::Memory);
        }
        let found = match look(file, StatxFlags::TYPE | StatxFlags::MNT_ID | StatxFlags::INO) {
            Ok(found) => found,
            // FUSE refuses it to other users. What is no file cannot be mapped anyway.
            Err(_) if self.foreign => return Ok(Origin::FileSystem { id: None }),
            Err(_) => return Err(ShmemError::Foreign("a file system that does not show it".into())),
        };
        if FileType::from_raw_mode(found.stx_mode.into()) != FileType::RegularFile {
            return Err(ShmemError::Place(Errno::INVAL.into()));
        }
        let on_file_system = Origin::FileSystem { id: Some(id(&found)) };
        if self.foreign {
            return Ok(on_file_system);
        }
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        mounts.refresh().map_err(ShmemError::Place)?;
        let mount = (found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id);
        let device = (found.stx_dev_major, found.stx_dev_minor);
        match mount.and_then(|id| mounts.by_id.get(&id)).or_else(|| mounts.by_device.get(&device)) {
            Some(kind) if LOCAL.contains(&kind.as_str()) => Ok(on_file_system),
            Some(kind) => Err(ShmemError::Foreign(format!("a file system of type {kind}"))),
            None => Err(ShmemError::Foreign("a file system that is not mounted here".into())),
        }
    }
}

impl Mounts {
    fn refresh(&mut self) -> io::Result<()> {
        let table = self.table.as_mut().ok_or(io::ErrorKind::NotFound)?;
        // proc(5): a change of the mounts is an exceptional condition of the open file.
        let mut polled = [PollFd::from_borrowed_fd(table.as_fd(), PollFlags::PRI)];
        poll(&mut polled, Some(&Timespec::default()))?;
        if self.is_read && polled[0].revents().is_empty() {
            return Ok(());
        }
        table.rewind()?;
        let mut text = Vec::new();
        table.read_to_end(&mut text)?;
        self.is_read = true;
        self.by_id.clear();
        self.by_device.clear();
        for (id, device, kind) in String::from_utf8_lossy(&text).lines().filter_map(entry) {
            self.by_id.insert(id, kind.to_string());
            self.by_device.insert(device, kind.to_string());
        }
        Ok(())
    }
}

/// Mount id, device number and type of a line of mountinfo.
fn entry(line: &str) -> Option<(u64, (u32, u32), &str)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ');
    let id = fields.next()?.parse().ok()?;
    let (major, minor) = fields.nth(1)?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    Some((id, device, file_system.split(' ').next()?))
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn mounts_are_read_as_the_kernel_writes_them() {
        for (line, expected) in [
            ("27 1 254:0 / / rw,relatime - ext4 /dev/vda rw", Some((27, (254, 0), "ext4"))),
            (
                r"36 35 0:98 /m\040nt /mnt rw master:1 shared:2 - fuse.sshfs host:/ rw",
                Some((36, (0, 98), "fuse.sshfs")),
            ),
            ("36 35 98:0 / / rw", None),
            ("", None),
        ] {
            assert_eq!(entry(line), expected, "{line}");
        }
    }

    #[test]
    fn files_of_memory_and_of_local_file_systems_are_taken() {
        // SHM-83
        let origins = Origins::new(false);
        let memfd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(origins.of(memfd.as_fd()).unwrap(), Origin::Memory);
        let program = File::open("/proc/self/exe").unwrap();
        assert!(matches!(origins.of(program.as_fd()), Ok(Origin::FileSystem { id: Some(_) })));
    }

    #[test]
    fn what_is_no_regular_file_is_refused_by_its_type_and_what_is_proc_s_by_its_file_system() {
        // SHM-47, SHM-83
        for foreign in [false, true] {
            let origins = Origins::new(foreign);
            let (socket, _) = UnixStream::pair().unwrap();
            let others: [OwnedFd; 3] =
                [socket.into(), File::open("/").unwrap().into(), File::open("/dev/zero").unwrap().into()];
            for fd in others {
                let error = origins.of(fd.as_fd()).unwrap_err();
                assert!(matches!(error, ShmemError::Place(error) if error.kind() == ErrorKind::InvalidInput));
            }
            let status = File::open("/proc/self/status").unwrap();
            let taken = origins.of(status.as_fd());
            assert!(
                matches!(&taken, Err(ShmemError::Foreign(kind)) if kind.contains("proc")) != foreign,
                "{taken:?}"
            );
        }
    }
}
