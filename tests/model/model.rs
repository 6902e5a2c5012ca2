//! What the contract says: intervals in regions, bytes in files. The arithmetic is that of a child, in
//! numbers that do not overflow.

use std::collections::BTreeMap;

use hotslot::memory::Access;
use hotslot_test_support::bench::PAGE;
use hotslot_test_support::wire::MMap;

use crate::operation::{FILES, Fds, Place, QUOTA, REGIONS, Target, Twist};

/// A mapping's name: region and offset.
pub type Key = (u8, u64);

#[derive(Clone, Debug)]
pub struct Mapping {
    /// As the back-end gave it.
    pub len: u64,
    pub file: usize,
    pub file_offset: u64,
    pub access: Access,
    /// Bytes at the end that are zeroes because the file became shorter, and what the guest wrote there.
    pub filled: u64,
    private: BTreeMap<u64, u8>,
}

impl Mapping {
    pub fn span(&self) -> u64 {
        self.len.next_multiple_of(PAGE)
    }

    /// What of it is not filled.
    fn file_len(&self) -> u64 {
        self.span() - self.filled
    }
}

/// What the guest finds at a place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Found {
    Hole,
    Byte(u8),
    /// The rest of the page in which the file ends.
    Tail,
    /// The file is too short.
    Missing(Key),
}

#[derive(Default)]
pub struct Model {
    pub live: BTreeMap<Key, Mapping>,
    pub files: [Vec<u8>; FILES],
    /// Whether the device was reset, and not started since.
    pub is_reset: bool,
}

impl Model {
    /// The errnos of which a SHMEM_MAP may be answered with one; none where it must succeed, and then it has.
    pub fn map(&mut self, request: &MMap, fds: Fds, slots: bool) -> Vec<i32> {
        let mut reasons = self.why_not_map(request, fds, slots);
        reasons.sort();
        if let (true, Fds::File { file, .. }) = (reasons.is_empty(), fds) {
            let mapping = Mapping {
                len: request.len,
                file,
                file_offset: request.fd_offset,
                access: match request.flags {
                    0 => Access::ReadOnly,
                    _ => Access::ReadWrite,
                },
                filled: 0,
                private: BTreeMap::new(),
            };
            self.live.insert((request.shmid, request.shm_offset), mapping);
        }
        reasons
    }

    fn why_not_map(&self, request: &MMap, fds: Fds, slots: bool) -> Vec<i32> {
        let mut reasons = Vec::new();
        let page = u128::from(PAGE);
        let [start, len, file_start] = [request.shm_offset, request.len, request.fd_offset].map(u128::from);
        let span = len.div_ceil(page) * page;
        match fds {
            Fds::None | Fds::Two => reasons.push(libc::EBADF), // SHM-27
            Fds::Device => reasons.push(libc::EINVAL),         // SHM-47
            // SHM-41
            Fds::File { read_only: true, .. } if request.flags & 1 != 0 => reasons.push(libc::EACCES),
            Fds::File { .. } => {}
        }
        if request.flags > 1 {
            reasons.push(libc::EINVAL); // SHM-42
        }
        if self.is_reset {
            reasons.push(libc::EBUSY); // SHM-75
        }
        if len == 0 || start % page != 0 || file_start % page != 0 {
            reasons.push(libc::EINVAL); // SHM-30, SHM-33
        }
        if file_start + span > i64::MAX as u128 {
            reasons.push(libc::EOVERFLOW); // SHM-32
        }
        if self.live.len() >= QUOTA || !slots {
            reasons.push(libc::ENOSPC); // SHM-48
        }
        match REGIONS.iter().find(|(shmid, _)| *shmid == request.shmid) {
            None => reasons.push(libc::ENOENT), // SHM-29
            Some(&(shmid, size)) => {
                if start + len > size.into() {
                    reasons.push(libc::ERANGE); // SHM-31
                }
                let overlaps = |(&(its_shmid, its_start), its): (&Key, &Mapping)| {
                    let its_end = u128::from(its_start + its.span());
                    its_shmid == shmid && start < its_end && u128::from(its_start) < start + span
                };
                if self.live.iter().any(overlaps) {
                    reasons.push(libc::EEXIST); // SHM-35
                }
            }
        }
        reasons
    }

    /// As [`Self::map`], for an SHMEM_UNMAP. SHM-51, SHM-52, SHM-54.
    pub fn unmap(&mut self, request: &MMap, fd: bool) -> Vec<i32> {
        let key = (request.shmid, request.shm_offset);
        let mut reasons = Vec::new();
        if fd {
            reasons.push(libc::EBADF);
        }
        if self.live.get(&key).is_none_or(|mapping| mapping.len != request.len) {
            reasons.push(libc::ENOENT);
        }
        if reasons.is_empty() {
            self.live.remove(&key);
        }
        reasons
    }

    pub fn reset(&mut self) {
        self.live.clear();
        self.is_reset = true;
    }

    /// What an SHMEM_UNMAP names.
    pub fn target(&self, target: &Target) -> MMap {
        let (shmid, shm_offset, len) = match *target {
            Target::Range { shmid, shm_offset, len } => (shmid, shm_offset, len),
            Target::Live { nth, twist } => match self.nth(nth) {
                None => (0, 0, PAGE),
                Some((&(shmid, offset), mapping)) => match twist {
                    Twist::Exact => (shmid, offset, mapping.len),
                    Twist::Rounded => (shmid, offset, mapping.span()),
                    Twist::WithNext => {
                        let next = self.live.get(&(shmid, offset + mapping.span()));
                        (shmid, offset, mapping.span() + next.map_or(PAGE, |next| next.len))
                    }
                    Twist::Longer => (shmid, offset, mapping.len + PAGE),
                    Twist::Shorter => (shmid, offset, mapping.len - 1),
                    Twist::Later => (shmid, offset + PAGE, mapping.len.saturating_sub(PAGE)),
                    Twist::OtherRegion => (shmid ^ 7, offset, mapping.len),
                },
            },
        };
        MMap {
            shmid,
            shm_offset,
            len,
            // SHM-53
            padding: [0xff; 7],
            fd_offset: !PAGE,
            flags: u64::MAX,
        }
    }

    /// The region and offset that the guest looks at.
    pub fn place(&self, place: Place) -> Key {
        match place {
            Place::Region { index, offset } => (REGIONS[index].0, offset % REGIONS[index].1),
            Place::Live { nth, offset } => match self.nth(nth) {
                None => (0, 0),
                Some((&(shmid, start), mapping)) => (shmid, start + offset % mapping.span()),
            },
        }
    }

    fn nth(&self, nth: usize) -> Option<(&Key, &Mapping)> {
        self.live.iter().nth(nth % self.live.len().max(1))
    }

    pub fn resize(&mut self, file: usize, len: u64) {
        self.files[file].resize(len as usize, 0);
    }

    fn holding(&self, (shmid, offset): Key) -> Option<(Key, &Mapping)> {
        let (&key, mapping) = self.live.range((shmid, 0)..=(shmid, offset)).next_back()?;
        (offset < key.1 + mapping.span()).then_some((key, mapping))
    }

    pub fn find(&self, place: Key) -> Found {
        let Some((key, mapping)) = self.holding(place) else {
            return Found::Hole;
        };
        let offset = place.1 - key.1;
        if offset >= mapping.file_len() {
            return Found::Byte(mapping.private.get(&offset).copied().unwrap_or(0));
        }
        let bytes = &self.files[mapping.file];
        let at = mapping.file_offset + offset;
        if at >= (bytes.len() as u64).next_multiple_of(PAGE) {
            Found::Missing(key)
        } else {
            bytes.get(at as usize).map_or(Found::Tail, |&byte| Found::Byte(byte))
        }
    }

    /// The guest wrote where it found a byte, and may write.
    pub fn write(&mut self, place: Key, byte: u8) {
        let Some((key, mapping)) = self.holding(place) else {
            return;
        };
        let (offset, file, at) = (place.1 - key.1, mapping.file, mapping.file_offset + place.1 - key.1);
        if offset < mapping.file_len() {
            self.files[file][at as usize] = byte;
        } else if let Some(mapping) = self.live.get_mut(&key) {
            mapping.private.insert(offset, byte);
        }
    }

    /// What of a mapping's end the file has not, in bytes.
    fn missing(&self, mapping: &Mapping) -> u64 {
        let end = (self.files[mapping.file].len() as u64).next_multiple_of(PAGE);
        let present = end.saturating_sub(mapping.file_offset).min(mapping.file_len());
        mapping.file_len() - present
    }

    /// The guest touched what is missing: zeroes are there from now on. How many in all is returned.
    pub fn fill(&mut self, key: Key) -> u64 {
        let missing = self.missing(&self.live[&key]);
        self.live.get_mut(&key).map_or(0, |mapping| {
            mapping.filled += missing;
            mapping.filled
        })
    }

    /// How many files something is mapped of.
    pub fn mapped_files(&self) -> usize {
        let mapped = |file: &usize| self.live.values().any(|mapping| mapping.file == *file);
        (0..FILES).filter(mapped).count()
    }
}
