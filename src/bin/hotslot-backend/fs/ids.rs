//! User and group ids: what the guest sees and what the host has (`--uid-map`, `--gid-map`).
//!
//! As with user namespaces, ranges of ids inside stand for ranges of the same size outside. Without a map all
//! ids are the same on both sides. Called by [`super::directory`] and [`super::xattr`].

use std::io;
use std::str::FromStr;

use fuse_backend_rs::abi::fuse_abi::stat64;
use rustix::io::Errno;

/// What the guest sees in place of an id that is in no range outside: "nobody", as user namespaces show it.
const UNMAPPED: u32 = 65534;

/// A range of ids of the guest and the host's ids that they stand for.
#[derive(Clone, Copy)]
pub struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Vec<u32> = text.split(':').map_while(|number| number.parse().ok()).collect();
        let [inside, outside, count] = numbers[..] else {
            return Err("it is not INSIDE:OUTSIDE:COUNT, three numbers".to_owned());
        };
        // The last number, 2^32 - 1, is no id.
        if count == 0 || [inside, outside].iter().any(|first| first.checked_add(count).is_none()) {
            return Err("its ids are not between 0 and 4294967294, or it has none".to_owned());
        }
        Ok(Range { inside, outside, count })
    }
}

/// The ranges of users, or those of groups.
#[derive(Clone, Default)]
pub struct Map(Vec<Range>);

impl Map {
    /// # Errors
    ///
    /// Two ranges overlap on one of the sides.
    pub fn new(ranges: &[Range]) -> Result<Self, String> {
        let overlap =
            |one: u32, other: u32, a: &Range, b: &Range| one < other + b.count && other < one + a.count;
        for (index, a) in ranges.iter().enumerate() {
            for b in &ranges[..index] {
                if overlap(a.inside, b.inside, a, b) || overlap(a.outside, b.outside, a, b) {
                    let text = |range: &Range| format!("{}:{}:{}", range.inside, range.outside, range.count);
                    return Err(format!("{} and {} overlap", text(b), text(a)));
                }
            }
        }
        Ok(Map(ranges.to_vec()))
    }

    /// The host's id of one of the guest's.
    pub fn outside(&self, id: u32) -> Option<u32> {
        if self.0.is_empty() {
            return Some(id);
        }
        let in_range = |range: &Range| {
            Some(range.outside + id.checked_sub(range.inside).filter(|&at| at < range.count)?)
        };
        self.0.iter().find_map(in_range)
    }

    /// The guest's id of one of the host's.
    pub fn inside(&self, id: u32) -> u32 {
        if self.0.is_empty() {
            return id;
        }
        let in_range = |range: &Range| {
            Some(range.inside + id.checked_sub(range.outside).filter(|&at| at < range.count)?)
        };
        self.0.iter().find_map(in_range).unwrap_or(UNMAPPED)
    }
}

/// The ids of users and of groups.
#[derive(Clone, Default)]
pub struct Ids {
    pub users: Map,
    pub groups: Map,
}

impl Ids {
    /// The host's user and group for a process of the guest that creates a file.
    ///
    /// # Errors
    ///
    /// EOVERFLOW, as in a user namespace: an id is in no range.
    pub fn creator(&self, user: u32, group: u32) -> io::Result<(u32, u32)> {
        match (self.users.outside(user), self.groups.outside(group)) {
            (Some(user), Some(group)) => Ok((user, group)),
            _ => Err(Errno::OVERFLOW.into()),
        }
    }

    /// The attributes of a file as the guest sees them.
    pub fn seen(&self, mut attributes: stat64) -> stat64 {
        attributes.st_uid = self.users.inside(attributes.st_uid);
        attributes.st_gid = self.groups.inside(attributes.st_gid);
        attributes
    }

    /// Exchanges the ids in a POSIX ACL: Linux' `struct posix_acl_xattr_header`, which is a le32 of version
    /// 2, and entries of le16 tag, le16 permissions, le32 id; or nothing.
    ///
    /// # Errors
    ///
    /// EINVAL: it has another form, or an id that is in no range.
    pub fn exchange(&self, acl: &mut [u8], side: Side) -> io::Result<()> {
        const ACL_USER: u16 = 0x02;
        const ACL_GROUP: u16 = 0x08;
        let invalid = || io::Error::from(Errno::INVAL);
        if acl.is_empty() {
            return Ok(());
        }
        let (version, entries) = acl.split_first_chunk_mut::<4>().ok_or_else(invalid)?;
        if u32::from_le_bytes(*version) != 2 || entries.len() % 8 != 0 {
            return Err(invalid());
        }
        for entry in entries.chunks_exact_mut(8) {
            let ([tag_0, tag_1, _, _], id) = entry.split_first_chunk_mut::<4>().ok_or_else(invalid)?;
            let map = match u16::from_le_bytes([*tag_0, *tag_1]) {
                ACL_USER => &self.users,
                ACL_GROUP => &self.groups,
                _ => continue,
            };
            let id: &mut [u8; 4] = id.try_into().map_err(|_| invalid())?;
            let number = u32::from_le_bytes(*id);
            *id = match side {
                Side::Inside => map.inside(number),
                Side::Outside => map.outside(number).ok_or_else(invalid)?,
            }
            .to_le_bytes();
        }
        Ok(())
    }
}

/// Whose ids are asked for.
#[derive(Clone, Copy)]
pub enum Side {
    /// The guest's.
    Inside,
    /// The host's.
    Outside,
}
