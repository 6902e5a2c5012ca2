//! What driver and device tell each other about the port, on the control queues (VIRTIO 1.2, section
//! 5.3.6.2). Pure: messages in, messages out.
//!
//! ```text
//!   driver                     device
//!   DEVICE_READY  ---------->
//!                 <----------  PORT_ADD
//!   PORT_READY    ---------->
//!                 <----------  PORT_NAME, PORT_OPEN 1 (0 later: the other end has closed)
//!   PORT_OPEN 1   ---------->  from now on bytes go to the driver; not after PORT_OPEN 0
//! ```

use std::collections::VecDeque;

/// `struct virtio_console_control { le32 id; le16 event; le16 value; }`.
pub const MESSAGE: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// The only port.
const ID: u32 = 0;

/// Messages that wait for a buffer of the driver's. Linux gives its buffers before it says that it is ready,
/// so only a driver that asks without end comes near.
const MOST_WAITING: usize = 32;

/// The port, as its driver knows it.
#[derive(Debug)]
pub struct Control {
    name: String,
    /// The driver knows the port, so it is told of changes.
    known: bool,
    /// A program of the guest has the port open.
    guest_open: bool,
    /// Messages for the driver, the oldest first.
    pub waiting: VecDeque<Vec<u8>>,
}

impl Control {
    /// Before the driver's first message, and again after a reset.
    pub fn new(name: &str) -> Self {
        Control { name: name.to_owned(), known: false, guest_open: false, waiting: VecDeque::new() }
    }

    /// Whether bytes for the guest find a reader there. Linux throws away what comes for a closed port.
    pub fn guest_open(&self) -> bool {
        self.guest_open
    }

    /// A message of the driver's; `host_open` says whether the port's other end is open. An error is a
    /// sentence.
    pub fn receive(&mut self, message: [u8; MESSAGE], host_open: bool) -> Result<(), String> {
        let [a, b, c, d, e, f, g, h] = message;
        let id = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        match (event, value) {
            // There the id has no meaning.
            (DEVICE_READY, 1) => self.send(PORT_ADD, 1, b""),
            (DEVICE_READY, _) => Err("the driver could not start the device".to_owned()),
            _ if id != ID => Err(format!("control message {event} is about port {id}, which does not exist")),
            (PORT_READY, 1) => {
                self.known = true;
                let name = self.name.clone();
                self.send(PORT_NAME, 1, name.as_bytes())?;
                self.send(PORT_OPEN, host_open.into(), b"")
            }
            (PORT_READY, _) => Err("the driver could not add the port".to_owned()),
            (PORT_OPEN, value) => {
                self.guest_open = value != 0;
                Ok(())
            }
            _ => Err(format!("control message {event} with value {value} is not for a device")),
        }
    }

    /// The port's other end has closed.
    pub fn host_closed(&mut self) -> Result<(), String> {
        if self.known { self.send(PORT_OPEN, 0, b"") } else { Ok(()) }
    }

    fn send(&mut self, event: u16, value: u16, more: &[u8]) -> Result<(), String> {
        if self.waiting.len() == MOST_WAITING {
            return Err(format!("{MOST_WAITING} control messages wait for buffers of the driver's"));
        }
        let message = [&ID.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), more].concat();
        self.waiting.push_back(message);
        Ok(())
    }
}
