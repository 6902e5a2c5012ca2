//! Device types, and what is known of each (VIRTIO section 5).

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A virtio device type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind(u32);

/// What is known of a device type.
pub struct Facts {
    name: &'static str,
    id: u32,
    /// The number of queues where the user does not say.
    pub queues: u16,
    /// The size of the configuration space in bytes; `None` where the type is not known.
    pub config_len: Option<usize>,
    /// Whether the device is of no use without its configuration space.
    pub needs_config: bool,
    /// Whether the device is of no use without shared memory.
    pub needs_shmem: bool,
    /// Feature bits without which the device is of no use: name and mask.
    pub features: &'static [(&'static str, u64)],
}

/// A type without a name.
const UNKNOWN: Facts = Facts {
    name: "",
    id: 0,
    queues: 1,
    config_len: None,
    needs_config: false,
    needs_shmem: false,
    features: &[],
};

/// The types that have a name; sizes are those of VIRTIO 1.3.
const KINDS: &[Facts] = &[
    Facts { name: "blk", id: 2, config_len: Some(60), needs_config: true, ..UNKNOWN },
    Facts { name: "console", id: 3, queues: 2, config_len: Some(12), ..UNKNOWN },
    Facts { name: "rng", id: 4, config_len: Some(0), ..UNKNOWN },
    Facts { name: "vsock", id: 19, queues: 3, config_len: Some(8), needs_config: true, ..UNKNOWN },
    // VIRTIO section 5.11.4: a tag of 36 bytes and the number of request queues. Two queues: hiprio and one
    // for requests.
    Facts { name: "fs", id: 26, queues: 2, config_len: Some(40), needs_config: true, ..UNKNOWN },
    // VIRTIO section 5.19.4: start and size, which the shared memory region replaces. Without that region
    // the persistent memory would be ours, not the back-end's.
    Facts {
        name: "pmem",
        id: 27,
        config_len: Some(16),
        needs_shmem: true,
        features: &[("VIRTIO_PMEM_F_SHMEM_REGION", 1 << 0)],
        ..UNKNOWN
    },
];

impl DeviceKind {
    /// The virtio device type number.
    pub fn id(self) -> u32 {
        self.0
    }

    /// What is known of it.
    pub fn facts(self) -> &'static Facts {
        KINDS.iter().find(|kind| kind.id == self.0).unwrap_or(&UNKNOWN)
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.facts().name {
            "" => write!(f, "type-{}", self.0),
            name => f.write_str(name),
        }
    }
}

/// A text that is no device type.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{0}` is no device type: give one of {names}, or a number from 1 to 255", names = names())]
pub struct UnknownKind(String);

/// The device types that have a name.
pub fn names() -> String {
    KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ")
}

impl FromStr for DeviceKind {
    type Err = UnknownKind;

    /// A name, or a number.
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let named = KINDS.iter().find(|kind| kind.name == text).map(|kind| kind.id);
        let id = named.or_else(|| text.parse().ok().filter(|id| (1..=255).contains(id)));
        id.map(DeviceKind).ok_or_else(|| UnknownKind(text.to_string()))
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
        let unknown = unknown.facts();
        assert_eq!((unknown.queues, unknown.config_len), (1, None));
        assert!(!unknown.needs_config && !unknown.needs_shmem);
        assert!(kind("pmem").facts().needs_shmem && kind("fs").facts().needs_config);
    }

    #[test]
    fn what_is_no_type_is_refused_with_those_that_are() {
        for text in ["", "disk", "0", "256", "-1", "4.0", "BLK", " blk"] {
            let error = text.parse::<DeviceKind>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("vsock, fs, pmem"), "{error}");
        }
    }
}
