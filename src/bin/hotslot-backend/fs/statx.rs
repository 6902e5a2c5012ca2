//! FUSE_STATX: the attributes of a file with the time when it was made, which FUSE_GETATTR lacks.
//!
//! Linux asks for it when a program asks for that time. Called by [`super::requests`].

use std::io;

use rustix::fs::{AtFlags, StatxFlags, StatxTimestamp};

use super::directory::Directory;

/// The numbers at the end of `struct fuse_statx` that mean nothing yet.
const SPARE: usize = 14 * size_of::<u64>();

impl Directory {
    /// Returns `struct fuse_statx_out`, with `struct fuse_statx` at its end.
    pub fn extended_status(&self, node: u64) -> io::Result<Vec<u8>> {
        let inode = self.inodes.get(node)?;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let found = rustix::fs::statx(&inode.path, c"", AtFlags::EMPTY_PATH, wanted)?;
        let valid = self.policy.cache.timeout();
        let user = self.policy.ids.users.inside(found.stx_uid);
        let group = self.policy.ids.groups.inside(found.stx_gid);
        let mut answer = Vec::new();
        let quads = |answer: &mut Vec<u8>, numbers: &[u64]| {
            answer.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        };
        let words = |answer: &mut Vec<u8>, numbers: &[u32]| {
            answer.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        };
        quads(&mut answer, &[valid.as_secs()]);
        words(&mut answer, &[valid.subsec_nanos(), 0]);
        quads(&mut answer, &[0, 0]);

        words(&mut answer, &[found.stx_mask & wanted.bits(), found.stx_blksize]);
        // No attributes, here and below: Linux takes none.
        quads(&mut answer, &[0]);
        words(&mut answer, &[found.stx_nlink, user, group, found.stx_mode.into()]);
        quads(&mut answer, &[found.stx_ino, found.stx_size, found.stx_blocks, 0]);
        for StatxTimestamp { tv_sec, tv_nsec, .. } in
            [found.stx_atime, found.stx_btime, found.stx_ctime, found.stx_mtime]
        {
            quads(&mut answer, &[tv_sec as u64]);
            words(&mut answer, &[tv_nsec, 0]);
        }
        words(
            &mut answer,
            &[found.stx_rdev_major, found.stx_rdev_minor, found.stx_dev_major, found.stx_dev_minor],
        );
        answer.extend([0; SPARE]);
        Ok(answer)
    }
}
