//! Numbers of the vhost-user specification by their names, without the prefix `VHOST_USER_`. They are written
//! down here once more, so that a wrong number in hotslot's own table is found.

/// Requests of the front-end, on the main socket.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const GET_SHMEM_CONFIG: u32 = 44;

    /// What a ring is started with.
    pub const RING: [u32; 7] = [
        SET_VRING_NUM,
        SET_VRING_BASE,
        SET_VRING_ADDR,
        SET_VRING_CALL,
        SET_VRING_ERR,
        SET_VRING_KICK,
        SET_VRING_ENABLE,
    ];

    /// What a device with two queues is started with.
    pub fn start() -> Vec<u32> {
        [&[SET_FEATURES, SET_MEM_TABLE][..], &RING, &RING, &[SET_STATUS]].concat()
    }
}

/// Requests of the back-end, on the backend channel: `BACKEND_SHMEM_MAP` and so on.
pub mod backend_request {
    pub const CONFIG_CHANGE_MSG: u32 = 2;
    pub const VRING_HOST_NOTIFIER_MSG: u32 = 3;
    pub const SHARED_OBJECT_LOOKUP: u32 = 8;
    pub const SHMEM_MAP: u32 = 9;
    pub const SHMEM_UNMAP: u32 = 10;
    /// A number that the specification does not have.
    pub const UNKNOWN: u32 = 50;
}

/// Feature bits: those of virtio, and the one that stands for protocol features.
pub const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;
pub const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// Protocol feature bits.
pub const PROTOCOL_F_MQ: u64 = 1 << 0;
pub const PROTOCOL_F_REPLY_ACK: u64 = 1 << 3;
pub const PROTOCOL_F_BACKEND_REQ: u64 = 1 << 5;
pub const PROTOCOL_F_CONFIG: u64 = 1 << 9;
pub const PROTOCOL_F_BACKEND_SEND_FD: u64 = 1 << 10;
pub const PROTOCOL_F_INFLIGHT_SHMFD: u64 = 1 << 12;
pub const PROTOCOL_F_RESET_DEVICE: u64 = 1 << 13;
pub const PROTOCOL_F_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
pub const PROTOCOL_F_STATUS: u64 = 1 << 16;
pub const PROTOCOL_F_SHMEM: u64 = 1 << 22;
/// hotslot's extension.
pub const PROTOCOL_F_SHMEM_ADDRESSES: u64 = 1 << 58;
