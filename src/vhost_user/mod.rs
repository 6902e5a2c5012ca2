//! The front-end side of vhost-user: devices whose back-ends are other processes, and the shared memory that
//! those map into the guest (protocol feature SHMEM).
//!
//! Reading order: [`message`] (the wire), [`connection`] (one socket), [`kind`] and [`negotiate`] (what is
//! agreed), [`frontend`] (our requests), [`backend_channel`] (theirs), [`watch`] (who serves those),
//! [`device`] (the virtio device that all this makes), [`sharing`] (what devices see of each other's
//! mappings).

pub mod backend_channel;
pub mod connection;
pub mod device;
pub mod frontend;
pub mod kind;
pub mod memory_table;
pub mod message;
pub mod negotiate;
pub mod sharing;
pub mod watch;
