//! The other end of `--gdb`: gdb's remote protocol, as packets on a socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::wait::{PATIENCE, eventually};

pub struct Gdb {
    socket: UnixStream,
}

impl Gdb {
    /// Connects once there is the socket.
    pub fn connect(path: &Path) -> Gdb {
        let mut socket = None;
        eventually("hotslot listens for gdb", || {
            socket = UnixStream::connect(path).ok();
            socket.is_some()
        });
        let socket = socket.unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Gdb { socket }
    }

    /// Sends a packet; its answer.
    pub fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.answer()
    }

    /// Sends a packet.
    pub fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        write!(self.socket, "${packet}#{sum:02x}").unwrap();
    }

    /// Ctrl-C.
    pub fn interrupt(&mut self) {
        self.socket.write_all(&[3]).unwrap();
    }

    /// The next packet, which is acknowledged.
    pub fn answer(&mut self) -> String {
        while self.byte() != b'$' {}
        let mut text = Vec::new();
        loop {
            match self.byte() {
                b'#' => break,
                // The byte before, so often again.
                b'*' => {
                    let again = self.byte() - 29;
                    let last = *text.last().unwrap();
                    text.extend(std::iter::repeat_n(last, again.into()));
                }
                byte => text.push(byte),
            }
        }
        let _sum = [self.byte(), self.byte()];
        // After `detach` nobody reads it.
        let _gone = self.socket.write_all(b"+");
        String::from_utf8(text).unwrap()
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.socket.read_exact(&mut byte).expect("the answer comes");
        byte[0]
    }

    /// A general register of the chosen thread: rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8 to r15, rip.
    pub fn register(&mut self, index: usize) -> u64 {
        let all = self.ask("g");
        number(&all[index * 16..][..16])
    }

    /// Reads 8 bytes of memory.
    pub fn read64(&mut self, address: u64) -> u64 {
        number(&self.ask(&format!("m{address:x},8")))
    }
}

/// A number as gdb writes it: its bytes in memory.
fn number(hex: &str) -> u64 {
    u64::from_str_radix(hex, 16).unwrap_or_else(|_| panic!("{hex:?} is not a number")).swap_bytes()
}
