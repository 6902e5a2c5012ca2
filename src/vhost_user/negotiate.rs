//! What is agreed with a back-end, as a pure function of what it offers (SHM-1 to SHM-6).
//!
//! `frontend` asks the back-end and calls [`negotiate`]; no I/O happens here.

use thiserror::Error;
use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_NOTIF_CONFIG_DATA, VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET, VIRTIO_F_SR_IOV, VIRTIO_F_VERSION_1,
};

use super::kind::DeviceKind;
use super::message::{F_LOG_ALL, F_PROTOCOL_FEATURES, protocol_features as protocol};

/// What a back-end offers.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// The answer to GET_FEATURES.
    pub features: u64,
    /// The answer to GET_PROTOCOL_FEATURES; 0 where it must not be asked (SHM-2).
    pub protocol_features: u64,
}

/// What was agreed. The default is nothing: that is how a connection starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    /// Feature bits for the driver to choose from.
    pub guest_features: u64,
    /// Feature bits that the back-end may be told: its own offer.
    pub backend_features: u64,
    /// What SET_PROTOCOL_FEATURES says; `None` where it must not be sent (SHM-2).
    pub protocol_features: Option<u64>,
    shmem: bool,
}

impl Agreement {
    /// Whether a protocol feature, given as its mask, was agreed on.
    pub fn has(&self, feature: u64) -> bool {
        self.protocol_features.is_some_and(|acked| acked & feature == feature)
    }

    /// Whether SHMEM was, under whatever bit it has for this device.
    pub fn has_shmem(&self) -> bool {
        self.shmem
    }

    /// The feature bits to tell the back-end of those that the driver accepted.
    pub fn features_for_backend(&self, accepted: u64) -> u64 {
        (accepted | F_PROTOCOL_FEATURES) & self.backend_features
    }
}

/// Why a back-end cannot be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NegotiationError {
    /// A back-end for legacy drivers only.
    #[error("the back-end does not offer VIRTIO_F_VERSION_1 (its features are {0:#x})")]
    NoVersion1(u64),
    /// The device type cannot do without a feature.
    #[error("the back-end does not offer {feature}, which a {kind} device needs (it offers {offered:#x})")]
    Missing {
        /// What is missing.
        feature: &'static str,
        /// The device type.
        kind: DeviceKind,
        /// The features, or protocol features, that it does offer.
        offered: u64,
    },
}

impl NegotiationError {
    /// The bit that could mean SHMEM in what the back-end offers instead (SHM-1), where that is what is
    /// missing.
    pub fn draft_bit(&self) -> Option<u32> {
        match *self {
            NegotiationError::Missing { feature: SHMEM_FEATURE, offered, .. } => {
                [21, 20].into_iter().find(|bit| offered & 1 << bit != 0)
            }
            _ => None,
        }
    }
}

const SHMEM_FEATURE: &str = "protocol feature SHMEM";

/// Feature bits of the transport that the front-end provides by itself, whatever the back-end offers.
const OURS: u64 = 1 << VIRTIO_F_RING_RESET;

/// Feature bits that are not passed on to the driver.
const NOT_PASSED_ON: u64 = F_PROTOCOL_FEATURES
    | F_LOG_ALL
    // There is no IOMMU, and no PCI.
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_F_SR_IOV
    // A notification that carries data would not match the ioeventfd of its queue.
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_F_NOTIF_CONFIG_DATA
    // A packed ring starts with other ring indices than those that we give a back-end.
    | 1 << VIRTIO_F_RING_PACKED;

/// Agrees with a back-end for a device of type `kind`, whose SHMEM bit is `shmem_bit` (SHM-1). `sees_others`:
/// it is to be told of other devices' mappings (SHM-80).
pub fn negotiate(
    offer: Offer,
    kind: DeviceKind,
    shmem_bit: u32,
    sees_others: bool,
) -> Result<Agreement, NegotiationError> {
    let Offer { features, protocol_features: offered } = offer;
    if features & 1 << VIRTIO_F_VERSION_1 == 0 {
        return Err(NegotiationError::NoVersion1(features));
    }
    for &(feature, mask) in kind.required_features() {
        if features & mask == 0 {
            return Err(NegotiationError::Missing { feature, kind, offered: features });
        }
    }
    let has_protocol = features & F_PROTOCOL_FEATURES != 0;
    // The back-end channel exists for SHMEM; without BACKEND_REQ there is no SHMEM (SHM-4).
    let shmem_mask = 1u64 << shmem_bit;
    let shmem = has_protocol && offered & shmem_mask != 0 && offered & protocol::BACKEND_REQ != 0;
    let wanted = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::BACKEND_REQ
        | protocol::BACKEND_SEND_FD
        | protocol::CONFIG
        | protocol::RESET_DEVICE
        | protocol::STATUS
        | if sees_others { protocol::CONFIGURE_MEM_SLOTS } else { 0 }
        | if shmem { shmem_mask } else { 0 };
    let acked = if has_protocol { offered & wanted } else { 0 };

    let missing = |feature| NegotiationError::Missing { feature, kind, offered };
    if kind.needs_shmem() && !shmem {
        let feature = match offered & shmem_mask {
            0 => SHMEM_FEATURE,
            _ => "protocol feature BACKEND_REQ",
        };
        return Err(missing(feature));
    }
    if kind.needs_config() && acked & protocol::CONFIG == 0 {
        return Err(missing("protocol feature CONFIG"));
    }
    Ok(Agreement {
        guest_features: features & !NOT_PASSED_ON | OURS,
        backend_features: features,
        protocol_features: has_protocol.then_some(acked),
        shmem,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

    fn agree(
        features: u64,
        protocol_features: u64,
        kind: &str,
        bit: u32,
    ) -> Result<Agreement, NegotiationError> {
        let offer = Offer { features, protocol_features };
        negotiate(offer, kind.parse().unwrap(), bit, false)
    }

    #[test]
    fn nothing_is_accepted_that_was_not_offered_nor_shmem_without_its_channel() {
        let with_protocol = VERSION_1 | F_PROTOCOL_FEATURES;
        let ours: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 16;
        for (features, offered, bit, acked, shmem) in [
            (with_protocol, u64::MAX, 22, Some(ours | 1 << 22), true), // SHM-1, SHM-5
            (with_protocol, u64::MAX, 21, Some(ours | 1 << 21), true), // SHM-1
            (with_protocol, u64::MAX, 20, Some(ours | 1 << 20), true), // SHM-1
            (with_protocol, 1 << 5 | 1 << 20 | 1 << 21, 22, Some(1 << 5), false), // SHM-1
            (with_protocol, 1 << 5 | 1 << 22, 20, Some(1 << 5), false), // SHM-1
            (with_protocol, 1 << 5 | 1 << 22, 22, Some(1 << 5 | 1 << 22), true), // SHM-5
            (with_protocol, 1 << 3 | 1 << 22, 22, Some(1 << 3), false), // SHM-4
            (with_protocol, 0, 22, Some(0), false),                    // SHM-3
            (VERSION_1, u64::MAX, 22, None, false),                    // SHM-2
        ] {
            let agreement = agree(features, offered, "rng", bit).unwrap();
            assert_eq!((agreement.protocol_features, agreement.has_shmem()), (acked, shmem), "{offered:#x}");
            for mask in (0..64).map(|bit| 1 << bit) {
                assert_eq!(agreement.has(mask), acked.unwrap_or(0) & mask != 0); // SHM-3
            }
        }
    }

    #[test]
    fn memory_slots_are_agreed_on_only_where_they_are_of_use() {
        // SHM-80
        for (offered, sees_others, agreed) in
            [(1 << 15, true, true), (1 << 15, false, false), (0, true, false)]
        {
            let offer = Offer { features: VERSION_1 | F_PROTOCOL_FEATURES, protocol_features: offered };
            let agreement = negotiate(offer, "rng".parse().unwrap(), 22, sees_others).unwrap();
            assert_eq!(agreement.has(protocol::CONFIGURE_MEM_SLOTS), agreed);
        }
    }

    #[test]
    fn the_driver_is_offered_what_the_back_end_and_the_transport_can_do() {
        let agreement = agree(u64::MAX, 0, "rng", 22).unwrap();
        for bit in [26, 30, 33, 34, 37, 38, 39] {
            assert_eq!(agreement.guest_features >> bit & 1, 0, "bit {bit}");
        }
        assert_eq!(agreement.guest_features | NOT_PASSED_ON, u64::MAX);
        let least = agree(VERSION_1, 0, "rng", 22).unwrap();
        assert_eq!(least.guest_features, VERSION_1 | 1 << VIRTIO_F_RING_RESET);
        // RING_RESET is ours, PROTOCOL_FEATURES is between us and the back-end.
        assert_eq!(least.features_for_backend(least.guest_features), VERSION_1);
        assert_eq!(agreement.features_for_backend(VERSION_1), VERSION_1 | F_PROTOCOL_FEATURES);
    }

    #[test]
    fn a_back_end_without_what_the_device_needs_is_refused_by_its_name() {
        let (both, shmem) = (VERSION_1 | F_PROTOCOL_FEATURES, 1 << 5 | 1 << 22);
        for (features, offered, kind, what) in [
            (F_PROTOCOL_FEATURES, shmem, "rng", "VIRTIO_F_VERSION_1"),
            (both, shmem, "pmem", "VIRTIO_PMEM_F_SHMEM_REGION"),
            (both | 1, 1 << 5, "pmem", "SHMEM"),
            (both | 1, 1 << 22, "pmem", "BACKEND_REQ"),
            (VERSION_1 | 1, 0, "pmem", "SHMEM"),
            (both, shmem, "blk", "CONFIG"),
        ] {
            let error = agree(features, offered, kind, 22).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        agree(both | 1, shmem, "pmem", 22).unwrap();
        agree(both, 1 << 9, "blk", 22).unwrap();
    }
}
