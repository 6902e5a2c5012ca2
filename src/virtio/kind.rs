//! Device types, and what follows from a type: how many queues, how large a configuration space, which
//! feature bits mean something.
//!
//! `table` has the facts; `config::device` reads types by their names, `vhost_user::connect` asks for the
//! rest.

mod table;

use std::fmt;
use std::str::FromStr;

use table::{COMMON, Count, Facts, Feature, KINDS, Queues, Regions, UNKNOWN};
use thiserror::Error;

/// A virtio device type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind(u32);

/// The most queues that a device can have here.
pub const MAX_QUEUES: u16 = 256;

impl DeviceKind {
    /// The virtio device type number.
    pub fn id(self) -> u32 {
        self.0
    }

    fn facts(self) -> &'static Facts {
        KINDS.iter().find(|kind| kind.id == self.0).unwrap_or(&UNKNOWN)
    }

    /// Whether nothing is known of it but its number.
    pub fn is_unknown(self) -> bool {
        self.facts().id == 0
    }

    /// Whether the device is of no use without shared memory.
    pub fn needs_shmem(self) -> bool {
        self.facts().regions == Regions::Always
    }

    /// Whether the device may have shared memory regions, as far as is known.
    pub fn has_regions(self) -> bool {
        self.facts().regions != Regions::Never
    }

    /// Whether a driver that writes what is in the configuration space already says nothing by it.
    pub fn has_settings(self) -> bool {
        self.facts().has_settings
    }

    /// Whether the driver writes a question to the configuration space, whose answer then is there.
    pub fn answers_in_config(self) -> bool {
        self.facts().answers_in_config
    }

    /// The feature bits without which the device is of no use: name and mask.
    pub fn needed_features(self) -> Vec<(String, u64)> {
        let facts = self.facts();
        let needed = facts.features.iter().filter(|feature| feature.needed);
        let prefix = facts.name.to_uppercase();
        needed.map(|feature| (format!("VIRTIO_{prefix}_F_{}", feature.name), feature.mask())).collect()
    }

    /// The largest queue that a driver may choose where the user does not say.
    pub fn queue_size(self) -> u16 {
        self.facts().queue_size
    }

    /// The bytes of the configuration space without which the device is of no use.
    pub fn least_config(self) -> usize {
        self.facts().config.unwrap_or(0)
    }

    /// The size of the configuration space of a device with these features, and the larger ones that it may
    /// have as well, ascending. Empty where it is not known.
    pub fn config_sizes(self, features: u64) -> Vec<usize> {
        let facts = self.facts();
        let Some(least) = facts.config else { return Vec::new() };
        let ends = |offered: u64| {
            let fields = facts.features.iter().filter(move |feature| feature.mask() & offered != 0);
            fields.map(|feature| feature.config_end)
        };
        let size = ends(features).fold(least, usize::max);
        let mut sizes: Vec<usize> = ends(u64::MAX).filter(|&end| end > size).chain([size]).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// The least number of queues with which a driver works.
    pub fn least_queues(self) -> u16 {
        let Queues { fixed, each, .. } = self.facts().queues;
        fixed + each
    }

    /// The number of queues of a device with these features and this configuration space. `None` where
    /// nothing is known of the type.
    pub fn queues(self, features: u64, config: &[u8]) -> Option<u16> {
        let facts = self.facts();
        let Queues { fixed, each, count } = facts.queues;
        let times = count.and_then(|count| count.read(features, config)).unwrap_or(1).max(1);
        let all = u32::from(each).saturating_mul(times).saturating_add((fixed + facts.more(features)).into());
        (facts.id != 0).then(|| all.min(MAX_QUEUES.into()) as u16)
    }

    /// Whether the answer to GET_QUEUE_NUM counts pairs of queues, without the control queue, as of passt,
    /// DPDK and QEMU. It then says how many there could be.
    pub fn counts_pairs(self) -> bool {
        self.facts().name == "net"
    }

    /// Whether this is a file system without a tag, by which drivers find it.
    pub fn lacks_tag(self, config: &[u8]) -> bool {
        self.facts().name == "fs" && config.first() == Some(&0)
    }

    /// Whether a back-end has several requests begun at a time, of which none may be lost or done twice.
    pub fn needs_inflight_record(self) -> bool {
        matches!(self.facts().name, "blk" | "scsi" | "fs")
    }

    /// Of a back-end's features, those that a driver can use with this many queues and bytes of configuration
    /// space: none whose field or queue is missing.
    pub fn usable(self, features: u64, queues: u16, config_len: usize) -> u64 {
        let mut usable = features;
        let mut left = queues.saturating_sub(self.least_queues());
        for feature in self.facts().features.iter().filter(|feature| feature.mask() & features != 0) {
            if feature.config_end > config_len || feature.queues > left {
                usable &= !feature.mask();
            } else {
                left -= feature.queues;
            }
        }
        let lacks = |feature: &&Feature| feature.with.is_some_and(|other| usable & 1 << other == 0);
        usable & !self.facts().features.iter().filter(lacks).fold(0, |mask, feature| mask | feature.mask())
    }

    /// Lowers the number of queues that the configuration space announces to those that there are.
    pub fn limit_queues(self, config: &mut [u8], features: u64, queues: u16) {
        let facts = self.facts();
        let Queues { fixed, each, count } = facts.queues;
        let Some(count) = count else { return };
        let most = u32::from(queues.saturating_sub(fixed + facts.more(features)) / each.max(1)).max(1);
        if count.read(features, config).is_some_and(|announced| announced > most) {
            count.write(config, most);
        }
    }

    /// The names of feature bits, ascending; `bit N` for one without a name.
    pub fn feature_names(self, features: u64) -> String {
        let name = |bit: u32| {
            let own = self.facts().features.iter().find(|feature| feature.bit == bit);
            let common = || COMMON.iter().find(|(other, _)| *other == bit).map(|(_, name)| *name);
            own.map(|feature| feature.name).or_else(common)
        };
        let bits = (0..64).filter(|bit| features & 1 << bit != 0);
        let names = bits.map(|bit| name(bit).map_or(format!("bit {bit}"), str::to_string));
        names.collect::<Vec<_>>().join(" ")
    }
}

impl Facts {
    /// The queues that these features bring.
    fn more(&self, features: u64) -> u16 {
        let offered = self.features.iter().filter(|feature| feature.mask() & features != 0);
        offered.map(|feature| feature.queues).sum()
    }
}

impl Feature {
    fn mask(&self) -> u64 {
        1 << self.bit
    }
}

impl Count {
    fn bytes<'a>(&self, features: u64, config: &'a [u8]) -> Option<&'a [u8]> {
        let is_there = self.with == 0 || self.with & features != 0;
        config.get(self.offset..self.offset + self.len).filter(|_| is_there)
    }

    fn read(&self, features: u64, config: &[u8]) -> Option<u32> {
        let bytes = self.bytes(features, config)?;
        Some(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte)))
    }

    fn write(&self, config: &mut [u8], number: u32) {
        if let Some(bytes) = config.get_mut(self.offset..self.offset + self.len) {
            bytes.copy_from_slice(&number.to_le_bytes()[..self.len]);
        }
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
        for (name, id) in [("net", 1), ("blk", 2), ("vsock", 19), ("pmem", 27), ("usb", 49)] {
            assert_eq!((kind(name).id(), kind(name)), (id, kind(&id.to_string())));
            assert_eq!(kind(name).to_string(), name);
        }
        let unknown = kind("200");
        assert_eq!((unknown.id(), unknown.to_string().as_str()), (200, "type-200"));
        assert!(unknown.is_unknown() && !unknown.needs_shmem() && !kind("usb").is_unknown());
        assert!(kind("fs").has_regions() && !kind("fs").needs_shmem() && !kind("vsock").has_regions());
        assert_eq!((unknown.queues(0, &[]), unknown.least_queues()), (None, 1));
        assert_eq!(kind("pmem").needed_features(), [("VIRTIO_PMEM_F_SHMEM_REGION".to_string(), 1)]);
    }

    #[test]
    fn the_table_is_in_order_and_makes_sense() {
        assert!(KINDS.is_sorted_by(|a, b| a.id < b.id));
        for facts in KINDS {
            let kind = DeviceKind(facts.id);
            assert_eq!(facts.name.parse(), Ok(kind), "one name each");
            assert!(facts.queue_size.is_power_of_two() && kind.least_queues() >= 1, "{kind}");
            assert!(facts.features.is_sorted_by(|a, b| a.bit < b.bit), "{kind}");
            for feature in facts.features {
                // VIRTIO section 2.2: the others are the transport's.
                assert!(feature.bit < 24 || (50..64).contains(&feature.bit), "{kind}: {}", feature.name);
                assert!(feature.with.is_none_or(|bit| facts.features.iter().any(|one| one.bit == bit)));
            }
        }
    }

    #[test]
    fn what_is_no_type_is_refused_with_those_that_are() {
        for text in ["", "disk", "0", "256", "-1", "4.0", "BLK", " blk"] {
            let error = text.parse::<DeviceKind>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("net, blk, console"), "{error}");
        }
    }

    #[test]
    fn sizes_of_configuration_spaces_follow_from_the_features() {
        for (name, features, sizes) in [
            ("blk", 0, &[8, 12, 16, 20, 24, 32, 33, 36, 48, 60, 72, 96][..]),
            ("blk", 1 << 6 | 1 << 14, &[60, 72, 96]),
            ("net", 1 << 5, &[6, 8, 10, 12, 17, 24, 28]),
            ("fs", 0, &[40, 44]),
            ("rng", u64::MAX, &[0]),
            ("9p", 0, &[]),
            ("200", 0, &[]),
        ] {
            assert_eq!(kind(name).config_sizes(features), sizes, "{name}");
        }
    }

    #[test]
    fn the_number_of_queues_follows_from_features_and_configuration() {
        let config = |offset: usize, number: u8| {
            let mut config = vec![0; 64];
            config[offset] = number;
            config
        };
        let control = 1 << 17;
        for (name, features, config, queues) in [
            ("net", 0, config(8, 3), 2),
            ("net", control, vec![], 3),
            ("net", control | 1 << 22, config(8, 3), 7),
            ("blk", 0, config(34, 4), 1),
            ("blk", 1 << 12, config(34, 4), 4),
            ("blk", 1 << 12, config(35, 4), MAX_QUEUES),
            ("blk", 1 << 12, vec![], 1),
            ("console", 0, config(4, 5), 2),
            ("console", 1 << 1, config(4, 1), 4),
            ("scsi", 0, vec![], 3),
            ("scsi", 0, config(0, 2), 4),
            ("crypto", 0, config(7, 255), MAX_QUEUES),
            ("fs", 0, config(36, 1), 2),
            ("fs", 1, config(36, 2), 4),
            ("gpio", 1, vec![], 2),
            ("sound", 0, vec![], 4),
        ] {
            assert_eq!(kind(name).queues(features, &config), Some(queues), "{name} {features:#x}");
        }
        let mut few = config(34, 4);
        kind("blk").limit_queues(&mut few, 1 << 12, 2);
        assert_eq!(few[34..36], [2, 0]);
        kind("blk").limit_queues(&mut few, 1 << 12, 3);
        assert_eq!(few[34..36], [2, 0]);
        let mut ports = config(4, 9);
        kind("console").limit_queues(&mut ports, 1 << 1, 8);
        assert_eq!(ports[4], 3);
    }

    #[test]
    fn a_feature_without_its_field_or_its_queue_is_not_offered() {
        let (mac, control, mq, rx) = (1 << 5, 1 << 17, 1 << 22, 1 << 18);
        let all = 1 | mac | control | mq | rx;
        for (queues, config_len, usable) in
            [(3, 12, all), (2, 12, 1 | mac), (3, 8, all & !mq), (3, 6, 1 | mac), (3, 0, 1)]
        {
            assert_eq!(kind("net").usable(all, queues, config_len), usable, "{queues} {config_len}");
        }
        assert_eq!(kind("console").usable(0b111, 2, 12), 0b101);
        assert_eq!(kind("console").usable(0b111, 4, 8), 0b011);
        assert_eq!(kind("200").usable(u64::MAX, 1, 0), u64::MAX);
    }

    #[test]
    fn feature_bits_have_names() {
        let features = 1 | 1 << 3 | 1 << 29 | 1 << 32;
        assert_eq!(kind("pmem").feature_names(features), "SHMEM_REGION bit 3 RING_EVENT_IDX VERSION_1");
    }
}
