//! The thread that tells a recipient's back-end of other devices' mappings.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::super::link::Link;
use super::super::wire::connection::Deadline;
use super::super::wire::frontend::Frontend;
use super::participant::{ANSWER_TIMEOUT, Participant};
use crate::sandbox::vmm::Kind;
use crate::thread;

/// The running thread. Dropping it stops and joins it, and ends both sockets of its back-end.
pub struct UpdateThread {
    /// What its back-end is among the devices.
    pub recipient: Participant,
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
}

impl UpdateThread {
    /// Starts it for a back-end that can be told of `room` mappings, over its main socket.
    pub fn start(
        name: &str,
        recipient: Participant,
        room: usize,
        main: Arc<Mutex<Frontend>>,
        link: Arc<Link>,
    ) -> io::Result<UpdateThread> {
        recipient.see_others(room, Arc::clone(&link));
        let (told, its_link) = (recipient.clone(), Arc::clone(&link));
        // Made first: if the thread does not start, no owner may wait for it.
        let mut updates = UpdateThread { recipient, link, thread: None };
        updates.thread =
            Some(thread::spawn(format!("share-{name}"), Kind::Update, move || run(&told, &main, &its_link))?);
        Ok(updates)
    }
}

fn run(recipient: &Participant, main: &Mutex<Frontend>, link: &Link) {
    while recipient.wait_for_work() {
        // One thing at a time: a vCPU may need the socket in between.
        let mut frontend = main.lock().unwrap_or_else(PoisonError::into_inner);
        if link.is_lost() {
            recipient.forget();
        } else {
            // A recipient that cannot be told is given up, and the log says why.
            let _ = recipient.tell_next(&mut frontend.converse(Deadline::after(ANSWER_TIMEOUT)));
        }
    }
}

impl Drop for UpdateThread {
    fn drop(&mut self) {
        self.recipient.see_nothing();
        // The thread may be waiting for an answer.
        self.link.hang_up();
        if let Some(thread) = self.thread.take() {
            // A panic in there was printed already.
            let _ = thread.join();
        }
    }
}
