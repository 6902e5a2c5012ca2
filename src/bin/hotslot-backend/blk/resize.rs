//! Tells the front-end when the file's size changes (vhost-user, BACKEND_CONFIG_CHANGE_MSG), so that it tells
//! the guest.
//!
//! A thread looks at the size each second. inotify would wake for each write of the guest's own, and tells
//! nothing of block devices; a signal would have to come from the user. The message does not ask for an
//! answer, so a front-end that does not know it holds nothing up. Called by [`super`].

use std::collections::HashSet;
use std::ffi::CString;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, send};
use vhost::vhost_user::Backend;

use hotslot::report::say;

use super::disk::Disk;
use super::limits::NAME;
use crate::lock::lock;

const INTERVAL: Duration = Duration::from_secs(1);
/// u32 request, u32 flags, u32 size of the payload: VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, none.
const CONFIG_CHANGE: [[u8; 4]; 3] = [2u32.to_ne_bytes(), 1u32.to_ne_bytes(), 0u32.to_ne_bytes()];

/// The front-end of a session, as far as it is to be told.
#[derive(Default)]
pub struct Told {
    /// Sectors when the session began.
    first: AtomicU64,
    /// Whether it reads the configuration space: else it cannot be told of a change.
    pub reads_config: AtomicBool,
    /// Innermost lock.
    channel: Mutex<Channel>,
}

#[derive(Default)]
struct Channel {
    known: HashSet<(RawFd, CString)>,
    /// Keeps the socket with that number open.
    open: Option<(Backend, RawFd)>,
}

impl Told {
    /// A session begins: the front-end has neither read the configuration space nor given its channel. The
    /// sockets that exist now are not that channel.
    pub fn begin(&self, disk: &Disk) {
        lock(&self.channel).known = disk.sockets.list().unwrap_or_default();
        // Where this fails, requests do, too, and say so.
        let sectors = disk.measure().unwrap_or(disk.sectors());
        self.first.store(sectors, Ordering::Relaxed);
    }

    /// SET_BACKEND_REQ_FD. The `vhost` crate can send requests for shared memory only, and does not give its
    /// socket away. So the socket is found: it is the one that came since [`Self::begin`], since only the
    /// session's own thread makes sockets.
    pub fn channel(self: &Arc<Self>, backend: Backend, disk: &Arc<Disk>) -> io::Result<()> {
        let mut channel = lock(&self.channel);
        let now = disk.sockets.list()?;
        let new: Vec<RawFd> = now.difference(&channel.known).map(|(number, _)| *number).collect();
        let [socket] = new[..] else {
            return Err(io::Error::other("the socket of the backend channel is not found"));
        };
        let first = channel.open.replace((backend, socket)).is_none();
        channel.known = now;
        if first {
            let (told, disk) = (Arc::downgrade(self), Arc::clone(disk));
            thread::Builder::new().name("resize".to_owned()).spawn(move || watch(&told, &disk))?;
        }
        Ok(())
    }

    /// Whether the message was sent. A front-end that has left others unread is told later.
    fn tell(&self) -> bool {
        let channel = lock(&self.channel);
        let Some((_, socket)) = channel.open.as_ref().filter(|_| self.reads_config.load(Ordering::Relaxed))
        else {
            return false;
        };
        send(*socket, CONFIG_CHANGE.as_flattened(), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).is_ok()
    }
}

/// Until the session ends.
fn watch(told: &Weak<Told>, disk: &Disk) {
    let (mut seen, mut due) = (None, false);
    loop {
        let Some(told) = told.upgrade() else {
            return;
        };
        if let Ok(sectors) = disk.measure()
            && seen.replace(sectors).unwrap_or(told.first.load(Ordering::Relaxed)) != sectors
        {
            say(format_args!("{NAME}: {:?} has {sectors} sectors now", disk.image.path));
            due = true;
        }
        due = due && !told.tell();
        drop(told);
        thread::sleep(INTERVAL);
    }
}
