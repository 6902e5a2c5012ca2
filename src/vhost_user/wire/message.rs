//! The vhost-user wire format: ids, feature bits, and each header and payload as a type (vhost-user
//! specification, "Message Specification" and "Communication"). Everything is in the machine's own byte
//! order.
//!
//! Pure data: `connection` moves these bytes, `frontend` and `channel` give them meaning.

/// The largest payload we take, in bytes. The largest that a back-end may send us is a [`ShmemConfig`]; a
/// header that announces more than this is noise (SHM-64).
pub const MAX_PAYLOAD: usize = 4096;

/// The most file descriptors that one message can carry (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// A value with a fixed layout: its fields one after the other.
pub trait Layout: Sized {
    /// Its size in bytes.
    const LEN: usize;

    /// Appends it to `bytes`.
    fn put(&self, bytes: &mut Vec<u8>);

    /// Takes it off the front of `bytes`; `None` where there is less.
    fn take(bytes: &mut &[u8]) -> Option<Self>;

    /// To the wire.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::LEN);
        self.put(&mut bytes);
        bytes
    }

    /// From the wire; `None` for a wrong size.
    fn decode(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() == Self::LEN { Self::take(&mut bytes) } else { None }
    }
}

macro_rules! integers {
    ($($integer:ident)*) => {
        $(impl Layout for $integer {
            const LEN: usize = size_of::<$integer>();

            fn put(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_ne_bytes());
            }

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                let (field, rest) = bytes.split_first_chunk()?;
                *bytes = rest;
                Some($integer::from_ne_bytes(*field))
            }
        })*
    };
}

integers! { u8 u16 u32 u64 }

impl<T: Layout + Copy + Default, const N: usize> Layout for [T; N] {
    const LEN: usize = N * T::LEN;

    fn put(&self, bytes: &mut Vec<u8>) {
        self.iter().for_each(|field| field.put(bytes));
    }

    fn take(bytes: &mut &[u8]) -> Option<Self> {
        let mut fields = [T::default(); N];
        for field in &mut fields {
            *field = T::take(bytes)?;
        }
        Some(fields)
    }
}

/// Defines structs together with their [`Layout`]. The fields have the specification's names.
macro_rules! layouts {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* })*) => {$(
        $(#[$doc])*
        #[allow(missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $(pub $field: $type,)*
        }

        impl Layout for $name {
            const LEN: usize = 0 $(+ <$type>::LEN)*;

            fn put(&self, bytes: &mut Vec<u8>) {
                $(self.$field.put(bytes);)*
            }

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                Some($name { $($field: <$type>::take(bytes)?,)* })
            }
        }
    )*};
}

layouts! {
    /// A message's header. `request` is its id, also in the reply; `size` is that of the payload, in bytes.
    Header { request: u32, flags: u32, size: u32 }

    /// The payload of MAP and UNMAP (struct VhostUserMMap, SHM-25). Offsets and the length are in bytes; the
    /// padding is ignored (SHM-26).
    MMap { shmid: u8, padding: [u8; 7], fd_offset: u64, shm_offset: u64, len: u64, flags: u64 }

    /// The payload of a GET_SHMEM_CONFIG reply (struct VhostUserShMemConfig, SHM-11). `nregions` is how many
    /// of the sizes, in bytes, the back-end says are not 0; the index of a size is the region's id.
    ShmemConfig { nregions: u32, padding: u32, sizes: [u64; 256] }

    /// A range of guest memory, `size` bytes: an entry of SET_MEM_TABLE, or all of a [`SingleRegion`]. It is
    /// at the guest physical address `guest_addr`, for ring addresses at `user_addr`, and in its file at
    /// `mmap_offset`.
    MemoryRegion { guest_addr: u64, size: u64, user_addr: u64, mmap_offset: u64 }

    /// The payload of ADD_MEM_REG and REM_MEM_REG.
    SingleRegion { padding: u64, region: MemoryRegion }

    /// What SET_VRING_NUM, SET_VRING_BASE and SET_VRING_ENABLE say of a ring, and GET_VRING_BASE's reply.
    VringState { index: u32, value: u32 }

    /// The payload of SET_VRING_ADDR: where the parts of a ring are, by [`MemoryRegion::user_addr`]; the
    /// guest physical address `log` is for migration.
    VringAddr { index: u32, flags: u32, descriptor_table: u64, used_ring: u64, available_ring: u64, log: u64 }

    /// The payload of GET_INFLIGHT_FD, its reply, and SET_INFLIGHT_FD: a buffer in which the back-end notes
    /// which requests of its queues it has begun. The padding is C's.
    Inflight { mmap_size: u64, mmap_offset: u64, num_queues: u16, queue_size: u16, padding: u32 }

    /// The first part of a GET_CONFIG or SET_CONFIG payload; `size` bytes of the configuration space follow.
    /// `flags` is 0 for a driver's access.
    ConfigHeader { offset: u32, size: u32, flags: u32 }
}

/// The bits of a header's flags.
mod flags {
    pub const VERSION: u32 = 0x1;
    pub const VERSION_MASK: u32 = 0x3;
    pub const REPLY: u32 = 1 << 2;
    pub const NEED_REPLY: u32 = 1 << 3;
}

impl Header {
    /// A request's header.
    pub fn request(request: u32, size: usize, need_reply: bool) -> Self {
        let need_reply = if need_reply { flags::NEED_REPLY } else { 0 };
        Header { request, flags: flags::VERSION | need_reply, size: size as u32 }
    }

    /// A reply's header.
    pub fn reply(request: u32, size: usize) -> Self {
        Header { request, flags: flags::VERSION | flags::REPLY, size: size as u32 }
    }

    /// The version: 1 is the only one there is.
    pub fn version(&self) -> u32 {
        self.flags & flags::VERSION_MASK
    }

    /// Whether this is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & flags::REPLY != 0
    }

    /// Whether the sender asks for an answer to a request that by itself has none.
    pub fn needs_reply(&self) -> bool {
        self.flags & flags::NEED_REPLY != 0
    }
}

/// Defines an enum of message ids together with its way back from the wire and its names in messages.
macro_rules! ids {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $id:literal => $spec:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum $name {
            $(#[doc = concat!("VHOST_USER_", $spec)] $variant = $id,)*
        }

        impl $name {
            /// From the wire; `None` for an id that we do not know.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some($name::$variant),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $($name::$variant => $spec,)*
                })
            }
        }
    };
}

ids! {
    /// Requests of the front-end, on the main socket: those that we send.
    FrontendRequest {
        GetFeatures = 1 => "GET_FEATURES",
        SetFeatures = 2 => "SET_FEATURES",
        SetOwner = 3 => "SET_OWNER",
        SetMemTable = 5 => "SET_MEM_TABLE",
        SetVringNum = 8 => "SET_VRING_NUM",
        SetVringAddr = 9 => "SET_VRING_ADDR",
        SetVringBase = 10 => "SET_VRING_BASE",
        GetVringBase = 11 => "GET_VRING_BASE",
        SetVringKick = 12 => "SET_VRING_KICK",
        SetVringCall = 13 => "SET_VRING_CALL",
        SetVringErr = 14 => "SET_VRING_ERR",
        GetProtocolFeatures = 15 => "GET_PROTOCOL_FEATURES",
        SetProtocolFeatures = 16 => "SET_PROTOCOL_FEATURES",
        GetQueueNum = 17 => "GET_QUEUE_NUM",
        SetVringEnable = 18 => "SET_VRING_ENABLE",
        SetBackendReqFd = 21 => "SET_BACKEND_REQ_FD",
        GetConfig = 24 => "GET_CONFIG",
        SetConfig = 25 => "SET_CONFIG",
        GetInflightFd = 31 => "GET_INFLIGHT_FD",
        SetInflightFd = 32 => "SET_INFLIGHT_FD",
        ResetDevice = 34 => "RESET_DEVICE",
        GetMaxMemSlots = 36 => "GET_MAX_MEM_SLOTS",
        AddMemReg = 37 => "ADD_MEM_REG",
        RemMemReg = 38 => "REM_MEM_REG",
        SetStatus = 39 => "SET_STATUS",
        GetStatus = 40 => "GET_STATUS",
        GetShmemConfig = 44 => "GET_SHMEM_CONFIG",
    }
}

ids! {
    /// Requests of the back-end, on the backend channel. We serve those that need no feature but CONFIG and
    /// SHMEM.
    BackendRequest {
        Iotlb = 1 => "BACKEND_IOTLB_MSG",
        ConfigChange = 2 => "BACKEND_CONFIG_CHANGE_MSG",
        HostNotifier = 3 => "BACKEND_VRING_HOST_NOTIFIER_MSG",
        VringCall = 4 => "BACKEND_VRING_CALL",
        VringErr = 5 => "BACKEND_VRING_ERR",
        SharedObjectAdd = 6 => "BACKEND_SHARED_OBJECT_ADD",
        SharedObjectRemove = 7 => "BACKEND_SHARED_OBJECT_REMOVE",
        SharedObjectLookup = 8 => "BACKEND_SHARED_OBJECT_LOOKUP",
        ShmemMap = 9 => "BACKEND_SHMEM_MAP",
        ShmemUnmap = 10 => "BACKEND_SHMEM_UNMAP",
    }
}

impl BackendRequest {
    /// The feature without which the back-end must not send it.
    pub fn feature(self) -> &'static str {
        match self {
            BackendRequest::Iotlb => "VIRTIO_F_ACCESS_PLATFORM",
            BackendRequest::ConfigChange => "CONFIG",
            BackendRequest::HostNotifier => "HOST_NOTIFIER",
            BackendRequest::VringCall | BackendRequest::VringErr => "INBAND_NOTIFICATIONS",
            BackendRequest::SharedObjectAdd
            | BackendRequest::SharedObjectRemove
            | BackendRequest::SharedObjectLookup => "SHARED_OBJECT",
            BackendRequest::ShmemMap | BackendRequest::ShmemUnmap => "SHMEM",
        }
    }
}

/// Protocol feature bits (VHOST_USER_PROTOCOL_F_...), as masks. SHMEM has no fixed bit: see SHM-1.
#[allow(missing_docs)]
pub mod protocol_features {
    /// GET_QUEUE_NUM.
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The backend channel.
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    /// Messages on the backend channel may carry file descriptors.
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    /// GET_INFLIGHT_FD, SET_INFLIGHT_FD.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    /// hotslot's own: the back-end is told where its shared memory regions are (SHM-82).
    pub const SHMEM_ADDRESSES: u64 = 1 << 58;

    /// The names of bits 0 to 22 in the merged specification.
    const NAMES: [&str; 23] = [
        "MQ",
        "LOG_SHMFD",
        "RARP",
        "REPLY_ACK",
        "MTU",
        "BACKEND_REQ",
        "CROSS_ENDIAN",
        "CRYPTO_SESSION",
        "PAGEFAULT",
        "CONFIG",
        "BACKEND_SEND_FD",
        "HOST_NOTIFIER",
        "INFLIGHT_SHMFD",
        "RESET_DEVICE",
        "INBAND_NOTIFICATIONS",
        "CONFIGURE_MEM_SLOTS",
        "STATUS",
        "XEN_MMAP",
        "SHARED_OBJECT",
        "DEVICE_STATE",
        "GET_VRING_BASE_INFLIGHT",
        "GPA_ADDRESSES",
        "SHMEM",
    ];

    /// The name of a bit; `shmem_bit` is the one that means SHMEM (SHM-1).
    pub fn name(bit: u32, shmem_bit: u32) -> String {
        match (bit, NAMES.get(bit as usize)) {
            (58, _) => "SHMEM_ADDRESSES".to_string(),
            (_, Some(_)) if bit == shmem_bit => "SHMEM".to_string(),
            (_, Some(name)) if *name != "SHMEM" => (*name).to_string(),
            _ => format!("bit {bit}"),
        }
    }

    /// The names of these bits, ascending.
    pub fn names(bits: u64, shmem_bit: u32) -> String {
        let named = (0..64).filter(|bit| bits & 1 << bit != 0).map(|bit| name(bit, shmem_bit));
        named.collect::<Vec<_>>().join(" ")
    }
}

/// VHOST_USER_F_PROTOCOL_FEATURES, one of the virtio feature bits: the back-end has protocol features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// VHOST_F_LOG_ALL, one of the virtio feature bits: for migration.
pub const F_LOG_ALL: u64 = 1 << 26;

impl MMap {
    /// The flag that asks for a mapping which the guest can write to.
    pub const READ_WRITE: u64 = 1 << 0;
}

/// The payload of SET_MEM_TABLE.
pub fn memory_table(regions: &[MemoryRegion]) -> Vec<u8> {
    let [count, padding] = [regions.len() as u32, 0];
    let mut bytes = [count, padding].encode();
    regions.iter().for_each(|region| region.put(&mut bytes));
    bytes
}

/// The payload of GET_CONFIG or SET_CONFIG: a driver's access to `data.len()` bytes.
pub fn config(offset: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = ConfigHeader { offset, size: data.len() as u32, flags: 0 }.encode();
    bytes.extend(data);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_three_words() {
        let bytes = |words: [u32; 3]| <[u8; 12]>::try_from(words.map(u32::to_ne_bytes).concat()).unwrap();
        // SHM-10, SHM-57
        assert_eq!(Header::request(44, 0, false).encode(), bytes([44, 0x1, 0]));
        assert_eq!(Header::request(5, 40, true).encode(), bytes([5, 0x9, 40]));
        assert_eq!(Header::reply(9, 8).encode(), bytes([9, 0x5, 8]));
        for flags in 0..16 {
            let header = Header::decode(&bytes([1, flags, 2])).unwrap();
            let expected = (flags % 4, flags / 4 % 2 == 1, flags / 8 == 1);
            assert_eq!((header.version(), header.is_reply(), header.needs_reply()), expected);
            assert_eq!((header.request, header.size), (1, 2));
        }
    }

    #[test]
    fn a_map_has_its_fields_where_the_specification_puts_them() {
        let mut payload = [0xee; MMap::LEN];
        payload[0] = 0xfe;
        for (at, value) in [(8, 1u64), (16, 2), (24, 3), (32, 4)] {
            payload[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        }
        let expected =
            MMap { shmid: 0xfe, padding: [0xee; 7], fd_offset: 1, shm_offset: 2, len: 3, flags: 4 };
        assert_eq!(MMap::decode(&payload), Some(expected)); // SHM-26
        // SHM-25
        assert_eq!(MMap::decode(&payload[..39]), None);
        assert_eq!(MMap::decode(&[&payload[..], &[0]].concat()), None);
        assert_eq!(MMap::decode(&[]), None);
    }

    #[test]
    fn a_layout_has_a_count_padding_and_256_sizes() {
        let mut payload = vec![0; ShmemConfig::LEN];
        payload[..8].copy_from_slice(&[2u32.to_ne_bytes(), [0xff; 4]].concat());
        payload[8..16].copy_from_slice(&5u64.to_ne_bytes());
        payload[2048..].copy_from_slice(&6u64.to_ne_bytes());
        let config = ShmemConfig::decode(&payload).unwrap(); // SHM-11
        assert_eq!((config.nregions, config.sizes.len()), (2, 256));
        assert_eq!((config.sizes[0], config.sizes[1], config.sizes[255]), (5, 0, 6)); // SHM-13
        for len in [0, 8, 2055, 2057] {
            payload.resize(len, 0);
            assert_eq!(ShmemConfig::decode(&payload), None); // SHM-12
        }
    }

    #[test]
    fn ids_have_the_specifications_numbers() {
        for (request, id) in [
            (FrontendRequest::GetShmemConfig, 44),
            (FrontendRequest::ResetDevice, 34),
            (FrontendRequest::GetMaxMemSlots, 36),
            (FrontendRequest::AddMemReg, 37),
            (FrontendRequest::RemMemReg, 38),
            (FrontendRequest::SetStatus, 39),
            (FrontendRequest::SetBackendReqFd, 21),
        ] {
            assert_eq!((request as u32, FrontendRequest::from_id(id)), (id, Some(request)));
        }
        assert_eq!(BackendRequest::from_id(9), Some(BackendRequest::ShmemMap));
        assert_eq!(BackendRequest::from_id(10), Some(BackendRequest::ShmemUnmap));
        for id in [0, 11, 44, u32::MAX] {
            assert_eq!(BackendRequest::from_id(id), None);
        }
    }
}
