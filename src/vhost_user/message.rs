//! The vhost-user wire format: headers, ids, feature bits and payload layouts (vhost-user specification,
//! "Message Specification" and "Communication"). Everything is in the machine's own byte order.
//!
//! Pure data: `connection` moves these bytes, `frontend` and `backend_channel` give them meaning.

/// Bytes of a message's header.
pub const HEADER_LEN: usize = 12;

/// The largest payload we take. The largest that the protocol has for us is [`SHMEM_CONFIG_LEN`]; more than
/// this is no message but noise (SHM-64).
pub const MAX_PAYLOAD: usize = 4096;

/// Bytes of a MAP or UNMAP payload (SHM-25).
pub const MMAP_LEN: usize = 40;

/// Bytes of a GET_SHMEM_CONFIG reply (SHM-11).
pub const SHMEM_CONFIG_LEN: usize = 8 + 8 * 256;

/// Bytes of the u64 that most replies are.
pub const U64_LEN: usize = 8;

/// The most file descriptors that one message can carry (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// The request bits of a header's flags.
mod flags {
    pub const VERSION: u32 = 0x1;
    pub const VERSION_MASK: u32 = 0x3;
    pub const REPLY: u32 = 1 << 2;
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The request's id; a reply has its request's.
    pub request: u32,
    flags: u32,
    /// Bytes of the payload.
    pub size: u32,
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

    /// From the wire.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields::new(bytes);
        Header { request: fields.u32(), flags: fields.u32(), size: fields.u32() }
    }

    /// To the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        for (chunk, field) in bytes.chunks_exact_mut(4).zip([self.request, self.flags, self.size]) {
            chunk.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
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
        GetProtocolFeatures = 15 => "GET_PROTOCOL_FEATURES",
        SetProtocolFeatures = 16 => "SET_PROTOCOL_FEATURES",
        GetQueueNum = 17 => "GET_QUEUE_NUM",
        SetVringEnable = 18 => "SET_VRING_ENABLE",
        SetBackendReqFd = 21 => "SET_BACKEND_REQ_FD",
        GetConfig = 24 => "GET_CONFIG",
        SetConfig = 25 => "SET_CONFIG",
        ResetDevice = 34 => "RESET_DEVICE",
        GetMaxMemSlots = 36 => "GET_MAX_MEM_SLOTS",
        AddMemReg = 37 => "ADD_MEM_REG",
        RemMemReg = 38 => "REM_MEM_REG",
        SetStatus = 39 => "SET_STATUS",
        GetShmemConfig = 44 => "GET_SHMEM_CONFIG",
    }
}

ids! {
    /// Requests of the back-end, on the backend channel: those that we serve.
    BackendRequest {
        ShmemMap = 9 => "BACKEND_SHMEM_MAP",
        ShmemUnmap = 10 => "BACKEND_SHMEM_UNMAP",
    }
}

/// Protocol feature bits (VHOST_USER_PROTOCOL_F_...), as masks.
pub mod protocol_features {
    /// The back-end has several queues, and tells how many.
    pub const MQ: u64 = 1 << 0;
    /// Requests may ask for an answer.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The backend channel.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The configuration space is the back-end's.
    pub const CONFIG: u64 = 1 << 9;
    /// Messages on the backend channel may carry file descriptors.
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// SHMEM's bit in the merged specification; drafts had 20 and 21 (SHM-1).
    pub const SHMEM_BIT: u32 = 22;
}

/// VHOST_USER_F_PROTOCOL_FEATURES: among the virtio feature bits, says that there are protocol features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// VHOST_F_LOG_ALL: among the virtio feature bits, for migration.
pub const F_LOG_ALL: u64 = 1 << 26;

/// The payload of MAP and UNMAP (struct VhostUserMMap).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MMap {
    /// The shared memory region's id.
    pub shmid: u8,
    /// The offset in the file, in bytes.
    pub fd_offset: u64,
    /// The offset in the region, in bytes.
    pub shm_offset: u64,
    /// The length in bytes.
    pub len: u64,
    /// Bit 0: read-write.
    pub flags: u64,
}

impl MMap {
    /// The flag that asks for a mapping which the guest can write to.
    pub const READ_WRITE: u64 = 1 << 0;

    /// From the wire. Padding is ignored (SHM-26); `None` for any other size than 40 bytes (SHM-25).
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let payload: &[u8; MMAP_LEN] = payload.try_into().ok()?;
        let mut fields = Fields::new(payload);
        let [shmid, _padding @ ..] = fields.u64().to_ne_bytes();
        Some(MMap {
            shmid,
            fd_offset: fields.u64(),
            shm_offset: fields.u64(),
            len: fields.u64(),
            flags: fields.u64(),
        })
    }
}

/// The payload of a GET_SHMEM_CONFIG reply (struct VhostUserShMemConfig).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShmemConfig {
    /// How many regions the back-end says that it has.
    pub nregions: u32,
    /// Bytes of each region; the index is its id, 0 means none.
    pub sizes: Vec<u64>,
}

impl ShmemConfig {
    /// From the wire; `None` for a wrong size.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        if payload.len() != SHMEM_CONFIG_LEN {
            return None;
        }
        let mut fields = Fields::new(payload);
        let nregions = fields.u32();
        let _padding = fields.u32();
        Some(ShmemConfig { nregions, sizes: (0..256).map(|_| fields.u64()).collect() })
    }
}

/// One entry of SET_MEM_TABLE, or all of ADD_MEM_REG and REM_MEM_REG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// The address that ring addresses are given in.
    pub user_addr: u64,
    /// Where it starts in its file descriptor.
    pub mmap_offset: u64,
}

/// Builds a payload field by field.
#[derive(Default)]
pub struct Payload(Vec<u8>);

impl Payload {
    /// Appends a u32.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// Appends a u64.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// Appends bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Appends a memory region.
    pub fn region(self, region: &MemoryRegion) -> Self {
        self.u64(region.guest_addr).u64(region.size).u64(region.user_addr).u64(region.mmap_offset)
    }
}

impl std::ops::Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Reads a payload field by field. What is beyond its end reads as 0: callers check the size first.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Fields(bytes)
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }
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
            let header = Header::decode(&bytes([1, flags, 2]));
            let expected = (flags % 4, flags / 4 % 2 == 1, flags / 8 == 1);
            assert_eq!((header.version(), header.is_reply(), header.needs_reply()), expected);
            assert_eq!((header.request, header.size), (1, 2));
        }
    }

    #[test]
    fn a_map_has_its_fields_where_the_specification_puts_them() {
        let mut payload = [0xee; MMAP_LEN];
        payload[0] = 0xfe;
        for (at, value) in [(8, 1u64), (16, 2), (24, 3), (32, 4)] {
            payload[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        }
        let expected = MMap { shmid: 0xfe, fd_offset: 1, shm_offset: 2, len: 3, flags: 4 };
        assert_eq!(MMap::decode(&payload), Some(expected)); // SHM-26
        // SHM-25
        assert_eq!(MMap::decode(&payload[..39]), None);
        assert_eq!(MMap::decode(&[&payload[..], &[0]].concat()), None);
        assert_eq!(MMap::decode(&[]), None);
    }

    #[test]
    fn a_layout_has_a_count_padding_and_256_sizes() {
        let mut payload = vec![0; SHMEM_CONFIG_LEN];
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
        for id in [0, 1, 8, 11, 44, u32::MAX] {
            assert_eq!(BackendRequest::from_id(id), None);
        }
    }
}
