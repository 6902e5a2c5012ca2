//! The front-end side of vhost-user: devices whose back-ends are other processes, and the shared memory that
//! those map into the guest (protocol feature SHMEM).
//!
//! Reading order: [`wire`] (the protocol), [`connect`] (finding a back-end), [`link`] (its two sockets),
//! [`shmem_handler`] (what it asks for, done), [`watch`] (the thread that serves it), [`device`] (the virtio
//! device that all this makes), `own_regions` (what its back-end is told of its own regions), [`sharing`]
//! (what devices see of each other's mappings).

pub mod connect;
pub mod device;
pub mod link;
pub mod memory_table;
mod own_regions;
pub mod sharing;
pub mod shmem_handler;
pub mod watch;
pub mod wire;
