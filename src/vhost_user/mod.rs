//! The front-end side of vhost-user: devices whose back-ends are other processes, and the shared memory that
//! those map into the guest (protocol feature SHMEM).
//!
//! Reading order: [`wire`] (the protocol), [`connect`] (finding a back-end), [`handshake`] (learning what it
//! is), [`link`] (its two sockets, and their loss), `memory_table` (RAM as it is told of it), `own_regions`
//! (what it is told of its own regions), [`shmem_handler`] (carries out its requests), [`watch`] (the thread
//! that serves it), [`backend`] (what the driver has made of the device), [`keeper`] (the thread that
//! connects again), [`device`] (the virtio device that all this makes), [`sharing`] (a device's mappings,
//! shown to other back-ends), [`tracer`] (a record of what passes).

pub mod backend;
pub mod connect;
pub mod device;
pub mod handshake;
pub mod keeper;
pub mod link;
pub mod memory_table;
mod own_regions;
pub mod sharing;
pub mod shmem_handler;
pub mod tracer;
pub mod watch;
pub mod wire;
