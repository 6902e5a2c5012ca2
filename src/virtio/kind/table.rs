//! The device types of VIRTIO section 5 (1.3, and the drafts of 1.4), as a table. [`super::DeviceKind`] reads
//! it.
//!
//! Configuration sizes are those that the specification gives to the fields; a field that a feature brings
//! stands with that feature. Queues are those that Linux' drivers set up. Queue sizes are QEMU's for its
//! vhost-user devices, since back-ends were tried with these, but 64 where QEMU has 4.

/// What is known of a device type.
pub struct Facts {
    /// The name on the command line.
    pub name: &'static str,
    /// The number of the type.
    pub id: u32,
    /// Bytes of the configuration space that the device has with any features, and a driver needs; `None`
    /// where the size is not known.
    pub config: Option<usize>,
    /// The number of queues.
    pub queues: Queues,
    /// The largest queue that a driver may choose, where the user does not say.
    pub queue_size: u16,
    /// Whether the device has shared memory regions.
    pub regions: Regions,
    /// Whether what a driver writes to the configuration space are settings: the same value again says
    /// nothing. QEMU has the settings of a SCSI host itself, and vhost-device-scsi ends at SET_CONFIG.
    pub has_settings: bool,
    /// Whether the driver writes a question to the configuration space, whose answer then is there.
    pub answers_in_config: bool,
    /// The feature bits of the type.
    pub features: &'static [Feature],
}

/// How many queues a device has: `fixed`, and `each` as often as the device says, at least once. Features can
/// bring more.
#[derive(Clone, Copy)]
pub struct Queues {
    pub fixed: u16,
    pub each: u16,
    /// Where the device says how often; `None`: once.
    pub count: Option<Count>,
}

/// Whether a device has shared memory regions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Regions {
    Never,
    Maybe,
    /// It is of no use without.
    Always,
}

/// A number in the configuration space.
#[derive(Clone, Copy)]
pub struct Count {
    pub offset: usize,
    /// Bytes, little-endian.
    pub len: usize,
    /// Only there with one of these features; 0 for always.
    pub with: u64,
}

/// A feature bit.
pub struct Feature {
    pub bit: u32,
    /// Without VIRTIO_..._F_.
    pub name: &'static str,
    /// The end of its field in the configuration space; 0 for none.
    pub config_end: usize,
    /// The queues that it brings.
    pub queues: u16,
    /// A feature bit without which it does not work.
    pub with: Option<u32>,
    /// Whether the device is of no use without it.
    pub needed: bool,
}

impl Feature {
    const fn field_ends(self, config_end: usize) -> Feature {
        Feature { config_end, ..self }
    }

    const fn adds_queues(self, queues: u16) -> Feature {
        Feature { queues, ..self }
    }

    const fn with(self, bit: u32) -> Feature {
        Feature { with: Some(bit), ..self }
    }

    const fn needed(self) -> Feature {
        Feature { needed: true, ..self }
    }
}

const fn bit(bit: u32, name: &'static str) -> Feature {
    Feature { bit, name, config_end: 0, queues: 0, with: None, needed: false }
}

const fn queues(fixed: u16) -> Queues {
    Queues { fixed, each: 0, count: None }
}

/// A type of which nothing is known: one queue of 128 entries, all that the back-ends of `vhost-device` take.
pub const UNKNOWN: Facts = Facts {
    name: "",
    id: 0,
    config: None,
    queues: queues(1),
    queue_size: 128,
    regions: Regions::Never,
    has_settings: false,
    answers_in_config: false,
    features: &[],
};

/// A type with a configuration space of fixed size.
const fn kind(id: u32, name: &'static str, config: usize, queues: Queues) -> Facts {
    Facts { id, name, config: Some(config), queues, ..UNKNOWN }
}

/// A type that the specification only names.
const fn named(id: u32, name: &'static str) -> Facts {
    Facts { id, name, ..UNKNOWN }
}

/// All types, by number.
pub const KINDS: &[Facts] = &[
    // Section 5.1: receiveq and transmitq of each pair. A back-end without a configuration space leaves the
    // control queue to the front-end, too, as QEMU has it: so CTRL_VQ has a field here, of which no byte is
    // its own.
    Facts {
        queue_size: 256,
        features: &[
            bit(0, "CSUM"),
            bit(1, "GUEST_CSUM"),
            bit(2, "CTRL_GUEST_OFFLOADS").with(NET_CTRL_VQ),
            bit(3, "MTU").field_ends(12),
            bit(5, "MAC").field_ends(6),
            bit(6, "GSO"),
            bit(7, "GUEST_TSO4"),
            bit(8, "GUEST_TSO6"),
            bit(9, "GUEST_ECN"),
            bit(10, "GUEST_UFO"),
            bit(11, "HOST_TSO4"),
            bit(12, "HOST_TSO6"),
            bit(13, "HOST_ECN"),
            bit(14, "HOST_UFO"),
            bit(15, "MRG_RXBUF"),
            bit(16, "STATUS").field_ends(8),
            bit(NET_CTRL_VQ, "CTRL_VQ").field_ends(8).adds_queues(1),
            bit(18, "CTRL_RX").with(NET_CTRL_VQ),
            bit(19, "CTRL_VLAN").with(NET_CTRL_VQ),
            bit(20, "CTRL_RX_EXTRA").with(NET_CTRL_VQ),
            bit(21, "GUEST_ANNOUNCE").with(NET_CTRL_VQ),
            bit(22, "MQ").field_ends(10).with(NET_CTRL_VQ),
            bit(23, "CTRL_MAC_ADDR").with(NET_CTRL_VQ),
            bit(50, "DEVICE_STATS").with(NET_CTRL_VQ),
            bit(51, "HASH_TUNNEL").field_ends(28).with(NET_CTRL_VQ),
            bit(52, "VQ_NOTF_COAL").with(NET_CTRL_VQ),
            bit(53, "NOTF_COAL").with(NET_CTRL_VQ),
            bit(54, "GUEST_USO4"),
            bit(55, "GUEST_USO6"),
            bit(56, "HOST_USO"),
            bit(57, "HASH_REPORT").field_ends(24).with(NET_CTRL_VQ),
            bit(59, "GUEST_HDRLEN"),
            bit(60, "RSS").field_ends(24).with(NET_CTRL_VQ),
            bit(61, "RSC_EXT"),
            bit(62, "STANDBY"),
            bit(63, "SPEED_DUPLEX").field_ends(17),
        ],
        ..kind(1, "net", 0, Queues { fixed: 0, each: 2, count: count(8, 2, 1 << 22 | 1 << 60) })
    },
    // Section 5.2: a request queue each.
    Facts {
        features: &[
            bit(0, "BARRIER"),
            bit(1, "SIZE_MAX").field_ends(12),
            bit(2, "SEG_MAX").field_ends(16),
            bit(4, "GEOMETRY").field_ends(20),
            bit(5, "RO"),
            bit(6, "BLK_SIZE").field_ends(24),
            bit(7, "SCSI"),
            bit(9, "FLUSH"),
            bit(10, "TOPOLOGY").field_ends(32),
            bit(11, "CONFIG_WCE").field_ends(33),
            bit(12, "MQ").field_ends(36),
            bit(13, "DISCARD").field_ends(48),
            bit(14, "WRITE_ZEROES").field_ends(60),
            bit(15, "LIFETIME"),
            bit(16, "SECURE_ERASE").field_ends(72),
            bit(17, "ZONED").field_ends(96),
        ],
        ..kind(2, "blk", 8, Queues { fixed: 0, each: 1, count: count(34, 2, 1 << 12) })
    },
    // Section 5.3: a pair for each port; MULTIPORT brings the control queues.
    Facts {
        features: &[
            bit(0, "SIZE").field_ends(4),
            bit(1, "MULTIPORT").field_ends(8).adds_queues(2),
            bit(2, "EMERG_WRITE").field_ends(12),
        ],
        ..kind(3, "console", 0, Queues { fixed: 0, each: 2, count: count(4, 4, 1 << 1) })
    },
    kind(4, "rng", 0, queues(1)),
    // Section 5.5.
    Facts {
        features: &[
            bit(0, "MUST_TELL_HOST"),
            bit(1, "STATS_VQ").adds_queues(1),
            bit(2, "DEFLATE_ON_OOM"),
            bit(3, "FREE_PAGE_HINT").field_ends(12).adds_queues(1),
            bit(4, "PAGE_POISON").field_ends(16),
            bit(5, "PAGE_REPORTING").adds_queues(1),
        ],
        ..kind(5, "balloon", 8, queues(2))
    },
    named(6, "io-memory"),
    Facts { features: &[bit(0, "NS")], ..kind(7, "rpmsg", 0, queues(2)) },
    // Section 5.6: controlq, eventq, request queues.
    Facts {
        has_settings: true,
        features: &[bit(0, "INOUT"), bit(1, "HOTPLUG"), bit(2, "CHANGE"), bit(3, "T10_PI")],
        ..kind(8, "scsi", 36, Queues { fixed: 2, each: 1, count: count(0, 4, 0) })
    },
    // A tag of any length.
    Facts { features: &[bit(0, "MOUNT_TAG")], ..named(9, "9p") },
    named(10, "mac80211-wlan"),
    kind(11, "rproc-serial", 0, queues(2)),
    Facts { queues: queues(2), ..named(12, "caif") },
    named(13, "memory-balloon"),
    // Section 5.7.
    Facts {
        queue_size: 256,
        regions: Regions::Maybe,
        features: &[
            bit(0, "VIRGL"),
            bit(1, "EDID"),
            bit(2, "RESOURCE_UUID"),
            bit(3, "RESOURCE_BLOB"),
            bit(4, "CONTEXT_INIT"),
            bit(5, "BLOB_ALIGNMENT").field_ends(20),
        ],
        ..kind(16, "gpu", 16, queues(2))
    },
    Facts { features: &[bit(0, "ALARM").adds_queues(1)], ..kind(17, "rtc", 0, queues(1)) },
    // Section 5.8.
    Facts { queue_size: 64, answers_in_config: true, ..kind(18, "input", 136, queues(2)) },
    // Section 5.10.
    Facts {
        features: &[bit(0, "STREAM"), bit(1, "SEQPACKET"), bit(2, "NO_IMPLIED_STREAM")],
        ..kind(19, "vsock", 8, queues(3))
    },
    // Section 5.9: data queues, then the control queue.
    Facts {
        features: &[
            bit(0, "REVISION_1"),
            bit(1, "CIPHER_STATELESS_MODE"),
            bit(2, "HASH_STATELESS_MODE"),
            bit(3, "MAC_STATELESS_MODE"),
            bit(4, "AEAD_STATELESS_MODE"),
            bit(5, "AKCIPHER_STATELESS_MODE"),
        ],
        ..kind(20, "crypto", 56, Queues { fixed: 1, each: 1, count: count(4, 4, 0) })
    },
    named(21, "signal-dist"),
    named(22, "pstore"),
    // Section 5.13.
    Facts {
        features: &[
            bit(0, "INPUT_RANGE").field_ends(24),
            bit(1, "DOMAIN_RANGE").field_ends(32),
            bit(2, "MAP_UNMAP").needed(),
            bit(3, "BYPASS"),
            bit(4, "PROBE").field_ends(36),
            bit(5, "MMIO"),
            bit(6, "BYPASS_CONFIG").field_ends(40),
        ],
        ..kind(23, "iommu", 8, queues(2))
    },
    Facts {
        features: &[bit(0, "ACPI_PXM"), bit(1, "UNPLUGGED_INACCESSIBLE"), bit(2, "PERSISTENT_SUSPEND")],
        ..kind(24, "mem", 56, queues(1))
    },
    // Section 5.14: control, event, tx, rx.
    Facts { queue_size: 64, features: &[bit(0, "CTLS").field_ends(16)], ..kind(25, "sound", 12, queues(4)) },
    // Section 5.11: hiprio, the notification queue, request queues.
    Facts {
        regions: Regions::Maybe,
        features: &[bit(0, "NOTIFICATION").field_ends(44).adds_queues(1)],
        ..kind(26, "fs", 40, Queues { fixed: 1, each: 1, count: count(36, 4, 0) })
    },
    // Section 5.19. The shared memory region takes the place of the fields `start` and `size`. Without that
    // region the persistent memory would be ours, not the back-end's.
    Facts {
        regions: Regions::Always,
        features: &[bit(0, "SHMEM_REGION").needed()],
        ..kind(27, "pmem", 0, queues(1))
    },
    kind(28, "rpmb", 3, queues(1)),
    kind(29, "mac80211-hwsim", 0, queues(2)),
    Facts { queues: queues(2), ..named(30, "video-encoder") },
    Facts { queues: queues(2), ..named(31, "video-decoder") },
    // Section 5.17.
    Facts {
        features: &[bit(0, "P2A_CHANNELS").adds_queues(1), bit(1, "SHARED_MEMORY")],
        ..kind(32, "scmi", 0, queues(1))
    },
    kind(33, "nitro-sec", 0, queues(1)),
    Facts {
        queue_size: 64,
        features: &[bit(0, "ZERO_LENGTH_REQUEST").needed()],
        ..kind(34, "i2c", 0, queues(1))
    },
    named(35, "watchdog"),
    // Section 5.23: Tx, Rx, control.
    Facts {
        queue_size: 64,
        features: &[bit(0, "CAN_CLASSIC"), bit(1, "CAN_FD"), bit(2, "RTR_FRAMES"), bit(3, "LATE_TX_ACK")],
        ..kind(36, "can", 2, queues(3))
    },
    named(37, "dmabuf"),
    named(38, "param-server"),
    named(39, "audio-policy"),
    Facts {
        features: &[bit(0, "VND_HCI"), bit(1, "MSFT_EXT"), bit(2, "AOSP_EXT"), bit(3, "CONFIG_V2")],
        queues: queues(2),
        ..named(40, "bt")
    },
    // Section 5.18: requestq; eventq with IRQ.
    Facts { features: &[bit(0, "IRQ").adds_queues(1)], ..kind(41, "gpio", 8, queues(1)) },
    named(42, "rdma"),
    named(43, "camera"),
    named(44, "ism"),
    Facts { queue_size: 64, ..kind(45, "spi", 32, queues(1)) },
    named(46, "tee"),
    named(47, "cpu-balloon"),
    // commandq, eventq.
    Facts { regions: Regions::Maybe, ..kind(48, "media", 40, queues(2)) },
    named(49, "usb"),
];

const NET_CTRL_VQ: u32 = 17;

const fn count(offset: usize, len: usize, with: u64) -> Option<Count> {
    Some(Count { offset, len, with })
}

/// The feature bits of the transport and the queues (VIRTIO section 6), and those that vhost-user has among
/// them.
pub const COMMON: &[(u32, &str)] = &[
    (24, "NOTIFY_ON_EMPTY"),
    (26, "VHOST_F_LOG_ALL"),
    (27, "ANY_LAYOUT"),
    (28, "RING_INDIRECT_DESC"),
    (29, "RING_EVENT_IDX"),
    (30, "VHOST_USER_F_PROTOCOL_FEATURES"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
];
