//! The socket on which gdb connects, and the bytes of a connection.

use std::fs::{File, remove_file, symlink_metadata};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use gdbstub::conn::Connection;
use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt,
};

/// A port on 127.0.0.1. Its connections inherit TCP_NODELAY: answers are short.
pub(super) fn tcp(port: u16) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))?;
    listen(&socket, 1)?;
    Ok(socket)
}

/// A Unix socket for this user only. It takes the place of one on which no process listens any more.
pub(super) fn unix(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let address = SocketAddrUnix::new(path)?;
    // A connection to another kind of file is refused, too.
    let is_left_over = || {
        symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
            && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) if is_left_over() => {
            remove_file(path)?;
            bind(&socket, &address)?;
        }
        result => result?,
    }
    // No process can connect before `listen`.
    chmod(path, Mode::RUSR | Mode::WUSR)?;
    listen(&socket, 1)?;
    Ok(socket)
}

/// The bytes from gdb.
pub(super) struct Input {
    connection: Arc<File>,
    bytes: std::vec::IntoIter<u8>,
}

impl Input {
    pub fn new(connection: Arc<File>) -> Input {
        Input { connection, bytes: Vec::new().into_iter() }
    }

    /// Whether the next byte has to be read first.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == 0
    }

    /// The next byte, for which this waits; `None` when gdb is gone.
    pub fn next(&mut self) -> Option<u8> {
        if self.is_empty() {
            let mut buffer = vec![0; 4096];
            let len = self.connection.as_ref().read(&mut buffer).ok()?;
            buffer.truncate(len);
            self.bytes = buffer.into_iter();
        }
        self.bytes.next()
    }
}

/// The bytes to gdb, sent in whole packets.
pub(super) struct Client {
    connection: Arc<File>,
    packet: Vec<u8>,
}

impl Client {
    pub fn new(connection: Arc<File>) -> Client {
        Client { connection, packet: Vec::new() }
    }
}

impl Connection for Client {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.packet.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let sent = self.connection.as_ref().write_all(&self.packet);
        self.packet.clear();
        sent
    }
}
