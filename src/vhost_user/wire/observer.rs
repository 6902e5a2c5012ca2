//! The seam for a trace: `frontend` and `channel` tell an [`Observer`], where there is one, of each message.
//! `vhost_user::tracer` implements it.

use std::error::Error;
use std::fmt::Debug;
use std::os::fd::BorrowedFd;

use super::message::Header;

/// One of the two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// The main socket: the requests are ours.
    Main,
    /// The backend channel: the requests are the back-end's.
    Backend,
}

/// A request that is about to be sent, or that came.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Request<'a> {
    pub socket: Socket,
    pub header: Header,
    pub payload: &'a [u8],
    /// The descriptors with it, as far as they were taken.
    pub files: &'a [BorrowedFd<'a>],
    /// More came than were taken.
    pub files_lost: bool,
}

/// What came of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome<'a> {
    /// The payload of the answer; `None` where there was none, or none was asked for.
    pub answer: Option<&'a [u8]>,
    /// The descriptor with it.
    pub file: Option<BorrowedFd<'a>>,
    /// Why it was refused, or failed.
    pub why: Option<&'a (dyn Error + 'static)>,
    /// The errno value of a refusal of ours, or 0.
    pub errno: i32,
    /// What came in place of the answer.
    pub noise: &'a [u8],
}

/// Sees the messages of a device's two sockets.
///
/// The methods are called on the thread that sends or receives, with the lock of that socket held: they must
/// not wait, and make no call on a descriptor that could ask another process.
pub trait Observer: Debug + Send + Sync {
    /// A request begins. The result is told of its end.
    fn begins(&self, request: Request<'_>) -> Box<dyn Pending>;

    /// These bytes came, on this socket, and are no message, or none that belongs there.
    fn noise(&self, socket: Socket, bytes: &[u8], why: &dyn Error);
}

/// A request whose end is not known yet.
pub trait Pending {
    /// It ended like that.
    fn ended(self: Box<Self>, outcome: Outcome<'_>);
}
