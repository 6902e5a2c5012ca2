//! A request that is answered with an error before it is one: why, and from which size on. Called by
//! [`super::requests`] and [`super::copies`].

use fuse_backend_rs::api::server::MAX_BUFFER_SIZE;
use rustix::io::Errno;

/// A request has a header, arguments and at most the data of one write.
pub const MAX_REQUEST: usize = MAX_BUFFER_SIZE as usize + (64 << 10);

/// Why a request is answered with an error.
pub struct Refused {
    /// For the guest.
    pub error: Errno,
    /// For the user.
    pub why: String,
}
