//! Negotiates features: a pure function of the back-end's offer (SHM-1 to SHM-6).
//!
//! `frontend` asks the back-end and calls [`negotiate`]; no I/O happens here.

use thiserror::Error;
use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};

use super::message::{F_LOG_ALL, F_PROTOCOL_FEATURES, protocol_features as protocol};

/// What a device needs of its back-end.
#[derive(Clone, Debug)]
pub struct Needs {
    /// The device type, as messages call it.
    pub device_type: String,
    /// Feature bits without which the device is of no use: name and mask.
    pub features: Vec<(String, u64)>,
    /// Whether the device is of no use unless the back-end gives its configuration space.
    pub config: bool,
    /// Whether the device is of no use without shared memory.
    pub shmem: bool,
    /// The protocol feature bit that means SHMEM to this back-end (SHM-1).
    pub shmem_bit: u32,
    /// Whether the back-end is to be told of more than one range of memory (SHM-80, SHM-89).
    pub memory_slots: bool,
    /// Whether the back-end is to keep account of the requests that it has begun, for the case that it dies.
    pub inflight: bool,
    /// The protocol features that may be agreed on: all, or those that were before the back-end died.
    pub acceptable: u64,
}

/// What was agreed. The default is nothing: that is how a connection starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    /// Feature bits for the driver to choose from.
    pub guest_features: u64,
    /// Feature bits that the back-end may be told: its own offer.
    pub backend_features: u64,
    /// The protocol features that the back-end offers.
    pub offered: u64,
    /// What SET_PROTOCOL_FEATURES says; `None` where it must not be sent (SHM-2).
    pub protocol_features: Option<u64>,
    /// Whether SHMEM was agreed on, under whatever bit it has for this device.
    pub shmem: bool,
}

impl Agreement {
    /// Whether a protocol feature, given as its mask, was agreed on.
    pub fn has(&self, feature: u64) -> bool {
        self.protocol_features.is_some_and(|acked| acked & feature == feature)
    }

    /// The feature bits to tell the back-end of those that the driver accepted.
    pub fn features_for_backend(&self, accepted: u64) -> u64 {
        (accepted | F_PROTOCOL_FEATURES) & self.backend_features
    }
}

/// Why a back-end cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum NegotiationError {
    #[error("the back-end does not offer feature VIRTIO_F_VERSION_1 (its features are {0:#x})")]
    NoVersion1(u64),
    /// The device type cannot do without a feature.
    #[error(
        "the back-end does not offer feature {feature}, which a device of type {device_type} needs (its features are {features:#x})"
    )]
    NoFeature { feature: String, device_type: String, features: u64 },
    /// The device cannot do without a protocol feature, and the back-end has none at all.
    #[error(
        "the back-end does not offer VHOST_USER_F_PROTOCOL_FEATURES, and so not protocol feature {feature}, which a device of type {device_type} needs"
    )]
    NoProtocolFeatures { feature: &'static str, device_type: String },
    #[error("the back-end does not offer protocol feature {feature}, which a device of type {device_type} needs (it offers {names})",
        names = if *.offered == 0 { "none".to_string() } else { protocol::names(*.offered, *.shmem_bit) })]
    NoProtocolFeature { feature: &'static str, device_type: String, offered: u64, shmem_bit: u32 },
}

impl NegotiationError {
    /// The protocol feature that is missing.
    pub fn protocol_feature(&self) -> Option<&'static str> {
        match *self {
            NegotiationError::NoProtocolFeatures { feature, .. }
            | NegotiationError::NoProtocolFeature { feature, .. } => Some(feature),
            _ => None,
        }
    }

    /// Where SHMEM is missing: another bit that the back-end offers, by which it may mean SHMEM (SHM-1).
    pub fn other_shmem_bit(&self) -> Option<u32> {
        match *self {
            NegotiationError::NoProtocolFeature { feature: SHMEM, offered, shmem_bit, .. } => {
                other_shmem_bit(offered, shmem_bit)
            }
            _ => None,
        }
    }
}

/// A bit that means SHMEM to some back-ends and is not the one asked for (SHM-1).
pub fn other_shmem_bit(offered: u64, shmem_bit: u32) -> Option<u32> {
    [22, 21, 20].into_iter().find(|&bit| bit != shmem_bit && offered & 1 << bit != 0)
}

const SHMEM: &str = "SHMEM";

/// Feature bits of the transport that the front-end provides by itself, whatever the back-end offers.
const OURS: u64 = 1 << VIRTIO_F_RING_RESET;

/// Feature bits that are between us and the back-end. Those that the transport cannot carry, such as
/// VIRTIO_F_RING_PACKED, are for the transport to leave out.
const NOT_FOR_THE_DRIVER: u64 = F_PROTOCOL_FEATURES | F_LOG_ALL;

/// Agrees with a back-end whose answer to GET_FEATURES was `features`, and to GET_PROTOCOL_FEATURES
/// `offered`; 0 where it must not be asked (SHM-2).
pub fn negotiate(features: u64, offered: u64, needs: &Needs) -> Result<Agreement, NegotiationError> {
    if features & 1 << VIRTIO_F_VERSION_1 == 0 {
        return Err(NegotiationError::NoVersion1(features));
    }
    let device_type = || needs.device_type.clone();
    if let Some((feature, _)) = needs.features.iter().find(|(_, mask)| features & mask == 0) {
        let feature = feature.clone();
        return Err(NegotiationError::NoFeature { feature, device_type: device_type(), features });
    }
    let has_protocol = features & F_PROTOCOL_FEATURES != 0;
    let offered = offered & needs.acceptable;
    let missing = |feature| {
        let (device_type, shmem_bit) = (device_type(), needs.shmem_bit);
        Err(match has_protocol {
            true => NegotiationError::NoProtocolFeature { feature, device_type, offered, shmem_bit },
            false => NegotiationError::NoProtocolFeatures { feature, device_type },
        })
    };
    // SHMEM's requests come on the backend channel: no SHMEM without BACKEND_REQ (SHM-4).
    let shmem_mask = 1u64 << needs.shmem_bit;
    let shmem = has_protocol && offered & shmem_mask != 0 && offered & protocol::BACKEND_REQ != 0;
    // SHM-82
    let addresses = protocol::SHMEM_ADDRESSES | protocol::CONFIGURE_MEM_SLOTS;
    let has_addresses = shmem && offered & addresses == addresses;
    let wanted = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::BACKEND_REQ
        | protocol::BACKEND_SEND_FD
        | protocol::CONFIG
        | protocol::RESET_DEVICE
        | protocol::STATUS
        | if needs.inflight { protocol::INFLIGHT_SHMFD } else { 0 }
        | if needs.memory_slots { protocol::CONFIGURE_MEM_SLOTS } else { 0 }
        | if has_addresses { addresses } else { 0 }
        | if shmem { shmem_mask } else { 0 };
    let acked = if has_protocol { offered & wanted } else { 0 };
    if needs.shmem && !shmem {
        return match offered & shmem_mask {
            0 => missing(SHMEM),
            _ => missing("BACKEND_REQ"),
        };
    }
    if needs.config && acked & protocol::CONFIG == 0 {
        return missing("CONFIG");
    }
    Ok(Agreement {
        guest_features: features & !NOT_FOR_THE_DRIVER | OURS,
        backend_features: features,
        offered,
        protocol_features: has_protocol.then_some(acked),
        shmem,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

    /// A device that needs nothing.
    fn needs() -> Needs {
        Needs {
            device_type: "rng".to_string(),
            features: Vec::new(),
            config: false,
            shmem: false,
            shmem_bit: 22,
            memory_slots: false,
            inflight: false,
            acceptable: u64::MAX,
        }
    }

    #[test]
    fn nothing_is_accepted_that_was_not_offered_nor_shmem_without_its_channel() {
        let with_protocol = VERSION_1 | F_PROTOCOL_FEATURES;
        let ours: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 16;
        let all = ours | 1 << 15 | 1 << 58;
        for (features, offered, bit, acked, shmem) in [
            (with_protocol, u64::MAX, 22, Some(all | 1 << 22), true), // SHM-1, SHM-5
            (with_protocol, u64::MAX, 21, Some(all | 1 << 21), true), // SHM-1
            (with_protocol, u64::MAX, 20, Some(all | 1 << 20), true), // SHM-1
            (with_protocol, 1 << 5 | 1 << 20 | 1 << 21, 22, Some(1 << 5), false), // SHM-1
            (with_protocol, 1 << 5 | 1 << 22, 20, Some(1 << 5), false), // SHM-1
            (with_protocol, 1 << 5 | 1 << 22, 22, Some(1 << 5 | 1 << 22), true), // SHM-5
            (with_protocol, 1 << 3 | 1 << 22, 22, Some(1 << 3), false), // SHM-4
            (with_protocol, 0, 22, Some(0), false),                   // SHM-3
            (VERSION_1, u64::MAX, 22, None, false),                   // SHM-2
        ] {
            let agreement = negotiate(features, offered, &Needs { shmem_bit: bit, ..needs() }).unwrap();
            assert_eq!((agreement.protocol_features, agreement.shmem), (acked, shmem), "{offered:#x}");
            for mask in (0..64).map(|bit| 1 << bit) {
                assert_eq!(agreement.has(mask), acked.unwrap_or(0) & mask != 0); // SHM-3
            }
        }
    }

    #[test]
    fn memory_slots_are_agreed_on_only_where_they_are_of_use() {
        // SHM-80
        for (offered, memory_slots, agreed) in
            [(1 << 15, true, true), (1 << 15, false, false), (0, true, false)]
        {
            let needs = Needs { memory_slots, ..needs() };
            let agreement = negotiate(VERSION_1 | F_PROTOCOL_FEATURES, offered, &needs).unwrap();
            assert_eq!(agreement.has(protocol::CONFIGURE_MEM_SLOTS), agreed);
        }
    }

    #[test]
    fn the_addresses_of_regions_are_agreed_on_only_with_regions_and_a_message_for_them() {
        // SHM-82
        let (channel, slots, shmem, addresses) = (1 << 5, 1 << 15, 1 << 22, 1 << 58);
        let all = channel | slots | shmem | addresses;
        for (offered, agreed) in [
            (all, all),
            (all & !addresses, channel | shmem),
            (all & !slots, channel | shmem),
            (all & !shmem, channel),
            (all & !channel, 0),
        ] {
            let agreement = negotiate(VERSION_1 | F_PROTOCOL_FEATURES, offered, &needs()).unwrap();
            assert_eq!(agreement.protocol_features, Some(agreed), "{offered:#x}");
        }
    }

    #[test]
    fn the_driver_is_offered_what_the_back_end_can_do() {
        let agreement = negotiate(u64::MAX, 0, &needs()).unwrap();
        assert_eq!(agreement.guest_features, !(1 << 26 | 1 << 30));
        let least = negotiate(VERSION_1, 0, &needs()).unwrap();
        assert_eq!(least.guest_features, VERSION_1 | 1 << VIRTIO_F_RING_RESET);
        // RING_RESET is ours, PROTOCOL_FEATURES is between us and the back-end.
        assert_eq!(least.features_for_backend(least.guest_features), VERSION_1);
        assert_eq!(agreement.features_for_backend(VERSION_1), VERSION_1 | F_PROTOCOL_FEATURES);
    }

    #[test]
    fn a_back_end_without_what_the_device_needs_is_refused_by_its_name() {
        let (both, shmem) = (VERSION_1 | F_PROTOCOL_FEATURES, 1 << 5 | 1 << 22);
        let (rng, blk) = (needs(), Needs { config: true, ..needs() });
        let feature = ("VIRTIO_PMEM_F_SHMEM_REGION".to_string(), 1 << 0);
        let pmem = Needs { features: vec![feature], shmem: true, ..needs() };
        for (features, offered, needs, what) in [
            (F_PROTOCOL_FEATURES, shmem, &rng, "VIRTIO_F_VERSION_1"),
            (both, shmem, &pmem, "VIRTIO_PMEM_F_SHMEM_REGION"),
            (both | 1, 1 << 5, &pmem, "SHMEM"),
            (both | 1, 1 << 22, &pmem, "BACKEND_REQ"),
            (VERSION_1 | 1, 0, &pmem, "VHOST_USER_F_PROTOCOL_FEATURES"),
            (both | 1, 1 << 3 | 1 << 5, &pmem, "it offers REPLY_ACK BACKEND_REQ"),
            (both, shmem, &blk, "CONFIG"),
        ] {
            let error = negotiate(features, offered, needs).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        negotiate(both | 1, shmem, &pmem).unwrap();
        negotiate(both, 1 << 9, &blk).unwrap();
    }
}
