//! Device types, and what the front-end has to know of each (VIRTIO section 5).

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A virtio device type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind(Id);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Id {
    /// An entry of [`KINDS`], by its index.
    Known(usize),
    Number(u32),
}

struct Kind {
    name: &'static str,
    id: u32,
    queues: u16,
    config: Config,
    needs_shmem: bool,
    features: &'static [(&'static str, u64)],
}

/// The configuration space of a device type: its size in bytes, and whether the device is of use without it.
#[derive(Clone, Copy)]
enum Config {
    Needed(usize),
    Optional(usize),
}

/// The types that have a name; sizes are those of VIRTIO 1.3.
const KINDS: &[Kind] = &[
    Kind { name: "blk", id: 2, queues: 1, config: Config::Needed(60), needs_shmem: false, features: &[] },
    Kind {
        name: "console",
        id: 3,
        queues: 2,
        config: Config::Optional(12),
        needs_shmem: false,
        features: &[],
    },
    Kind { name: "rng", id: 4, queues: 1, config: Config::Optional(0), needs_shmem: false, features: &[] },
    Kind { name: "vsock", id: 19, queues: 3, config: Config::Needed(8), needs_shmem: false, features: &[] },
    // VIRTIO section 5.11.4: a tag of 36 bytes and the number of request queues. Two queues: hiprio and one
    // for requests.
    Kind { name: "fs", id: 26, queues: 2, config: Config::Needed(40), needs_shmem: false, features: &[] },
    // VIRTIO section 5.19.4: start and size, which the shared memory region replaces. Persistent memory that
    // is no shared memory region would be memory of ours, not of a back-end.
    Kind {
        name: "pmem",
        id: 27,
        queues: 1,
        config: Config::Optional(16),
        needs_shmem: true,
        features: &[("VIRTIO_PMEM_F_SHMEM_REGION", 1 << 0)],
    },
];

impl DeviceKind {
    /// The virtio device type number.
    pub fn id(self) -> u32 {
        match self.0 {
            Id::Known(index) => KINDS[index].id,
            Id::Number(id) => id,
        }
    }

    fn known(self) -> Option<&'static Kind> {
        match self.0 {
            Id::Known(index) => KINDS.get(index),
            Id::Number(_) => None,
        }
    }

    /// The number of queues where the user does not say.
    pub fn default_queues(self) -> u16 {
        self.known().map_or(1, |kind| kind.queues)
    }

    /// The size of the configuration space in bytes; `None` where we do not know the type.
    pub fn config_len(self) -> Option<usize> {
        self.known().map(|kind| match kind.config {
            Config::Needed(len) | Config::Optional(len) => len,
        })
    }

    /// Whether the device is of no use without its configuration space.
    pub fn needs_config(self) -> bool {
        self.known().is_some_and(|kind| matches!(kind.config, Config::Needed(_)))
    }

    /// Whether the device is of no use without shared memory.
    pub fn needs_shmem(self) -> bool {
        self.known().is_some_and(|kind| kind.needs_shmem)
    }

    /// Feature bits without which the device is of no use: name and mask.
    pub fn required_features(self) -> &'static [(&'static str, u64)] {
        self.known().map_or(&[], |kind| kind.features)
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some(kind) => f.write_str(kind.name),
            None => write!(f, "type-{}", self.id()),
        }
    }
}

/// What is not a device type.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{0}` is no device type: give one of {names}, or a number from 1 to 255", names = names())]
pub struct UnknownKind(String);

fn names() -> String {
    KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ")
}

impl FromStr for DeviceKind {
    type Err = UnknownKind;

    /// A name, or a number.
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        if let Some(index) = KINDS.iter().position(|kind| kind.name == text) {
            return Ok(DeviceKind(Id::Known(index)));
        }
        let id = text.parse().ok().filter(|id| (1..=255).contains(id));
        let id: u32 = id.ok_or_else(|| UnknownKind(text.to_string()))?;
        match KINDS.iter().position(|kind| kind.id == id) {
            Some(index) => Ok(DeviceKind(Id::Known(index))),
            None => Ok(DeviceKind(Id::Number(id))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(text: &str) -> DeviceKind {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_and_its_number_are_the_same_type() {
        for (name, id) in [("blk", 2), ("console", 3), ("rng", 4), ("vsock", 19), ("fs", 26), ("pmem", 27)] {
            assert_eq!((kind(name).id(), kind(name)), (id, kind(&id.to_string())));
            assert_eq!(kind(name).to_string(), name);
        }
        let unknown = kind("200");
        assert_eq!((unknown.id(), unknown.to_string().as_str()), (200, "type-200"));
        assert_eq!((unknown.default_queues(), unknown.config_len()), (1, None));
        assert!(!unknown.needs_config() && !unknown.needs_shmem());
        assert!(kind("pmem").needs_shmem() && kind("fs").needs_config());
    }

    #[test]
    fn what_is_no_type_is_refused_with_those_that_are() {
        for text in ["", "disk", "0", "256", "-1", "4.0", "BLK", " blk"] {
            let error = text.parse::<DeviceKind>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("vsock, fs, pmem"), "{error}");
        }
    }
}
