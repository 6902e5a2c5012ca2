//! The frames of the link: one byte kind, four bytes length (little endian), then that many bytes.
//!
//! Both ends are this program, built from one source, so there is no version. They still check what they
//! read: the console of a broken kernel must not become an allocation of 4 GiB.

use std::io::{self, Read, Write};

/// Longest payload: a virtio-serial port takes 32 KiB at once, and a frame should be one write.
pub const LONGEST: usize = 32 * 1024 - HEADER;
/// The start frame alone may be longer: a command line is up to 2 MiB on Linux.
const LONGEST_READ: usize = 4 << 20;
const HEADER: usize = 5;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Inside to outside: up, and waiting for [`Kind::Start`]. No payload.
    Hello,
    /// Outside to inside: what to run ([`Start::to_bytes`]).
    Start,
    /// Outside to inside: standard input; an empty one is its end.
    Input,
    /// Outside to inside: the terminal's rows and columns, two `u16`.
    WindowSize,
    /// Inside to outside: standard output.
    Output,
    /// Inside to outside: standard error.
    Error,
    /// Inside to outside: a file follows: mode (`u32`), size (`u64`), then its path.
    File,
    /// Inside to outside: a directory: mode (`u32`), then its path.
    Directory,
    /// Inside to outside: bytes of the file announced last: offset (`u64`), then the bytes. What is not sent
    /// is zero.
    Data,
    /// Inside to outside: the command's exit status, one byte. The last frame.
    Exit,
}

/// Each kind, with the byte that stands for it.
const KINDS: [(Kind, u8); 10] = [
    (Kind::Hello, b'H'),
    (Kind::Start, b'S'),
    (Kind::Input, b'I'),
    (Kind::WindowSize, b'W'),
    (Kind::Output, b'O'),
    (Kind::Error, b'E'),
    (Kind::File, b'F'),
    (Kind::Directory, b'K'),
    (Kind::Data, b'D'),
    (Kind::Exit, b'X'),
];

/// Sends one frame, in one write.
pub fn send(port: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let byte = KINDS.iter().find(|(one, _)| *one == kind).map_or(0, |(_, byte)| *byte);
    let length = u32::try_from(payload.len()).map_err(|_| io::Error::other("a frame of more than 4 GiB"))?;
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    frame.push(byte);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    port.write_all(&frame)
}

/// Receives one frame; `None` at the end of the stream.
pub fn receive(port: &mut impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut header = [0; HEADER];
    match port.read_exact(&mut header[..1]) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    port.read_exact(&mut header[1..])?;
    let [byte, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    let Some((kind, _)) = KINDS.iter().find(|(_, one)| *one == byte) else {
        return Err(io::Error::other(format!("byte {byte:#04x} begins no frame")));
    };
    if length > LONGEST_READ {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    port.read_exact(&mut payload)?;
    Ok(Some((*kind, payload)))
}

/// What to run, and how.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The command's words.
    pub command: Vec<Vec<u8>>,
    /// `NAME=VALUE`, added to the environment.
    pub environment: Vec<Vec<u8>>,
    /// The directory to run it in.
    pub directory: Vec<u8>,
    /// Files and directories to send back at the end.
    pub outputs: Vec<Vec<u8>>,
    /// Directories of the outside to mount at the same paths, each by virtio-fs under its [`share_tag`].
    pub shares: Vec<Vec<u8>>,
    /// Rows and columns of its terminal; `None`: pipes instead of a terminal.
    pub terminal: Option<(u16, u16)>,
}

impl Start {
    /// The payload of [`Kind::Start`]: fields, each a letter, its bytes, and a NUL (which none of them can
    /// hold).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut field = |letter: u8, value: &[u8]| {
            bytes.push(letter);
            bytes.extend_from_slice(value);
            bytes.push(0);
        };
        self.command.iter().for_each(|word| field(b'c', word));
        self.environment.iter().for_each(|pair| field(b'e', pair));
        self.outputs.iter().for_each(|path| field(b'o', path));
        self.shares.iter().for_each(|path| field(b's', path));
        field(b'd', &self.directory);
        if let Some((rows, columns)) = self.terminal {
            field(b't', format!("{rows} {columns}").as_bytes());
        }
        bytes
    }

    /// The inverse of [`Start::to_bytes`]; fields that it does not know are skipped.
    pub fn from_bytes(bytes: &[u8]) -> Start {
        let mut start = Start::default();
        for field in bytes.split(|byte| *byte == 0) {
            let Some((letter, value)) = field.split_first() else {
                continue;
            };
            match letter {
                b'c' => start.command.push(value.to_vec()),
                b'e' => start.environment.push(value.to_vec()),
                b'o' => start.outputs.push(value.to_vec()),
                b's' => start.shares.push(value.to_vec()),
                b'd' => start.directory = value.to_vec(),
                b't' => {
                    let text = String::from_utf8_lossy(value);
                    let mut numbers = text.split(' ').map(|number| number.parse().unwrap_or(0));
                    start.terminal = numbers.next().zip(numbers.next());
                }
                _ => {}
            }
        }
        start
    }
}

/// The virtio-fs tag of the shared directory with this number.
pub fn share_tag(number: usize) -> String {
    format!("share{number}")
}

/// The payload of [`Kind::WindowSize`].
pub fn window_size_to_bytes((rows, columns): (u16, u16)) -> [u8; 4] {
    let ([a, b], [c, d]) = (rows.to_le_bytes(), columns.to_le_bytes());
    [a, b, c, d]
}

/// The inverse of [`window_size_to_bytes`].
pub fn window_size_from_bytes(bytes: &[u8]) -> Option<(u16, u16)> {
    let [a, b, c, d] = *bytes else { return None };
    Some((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_arrive_as_they_were_sent_and_the_end_is_the_end() {
        let mut stream = Vec::new();
        for (kind, _) in KINDS {
            send(&mut stream, kind, format!("{kind:?}").as_bytes()).unwrap();
        }
        send(&mut stream, Kind::Input, b"").unwrap();
        let mut stream = stream.as_slice();
        for (kind, _) in KINDS {
            let expected = (kind, format!("{kind:?}").into_bytes());
            assert_eq!(receive(&mut stream).unwrap(), Some(expected));
        }
        assert_eq!(receive(&mut stream).unwrap(), Some((Kind::Input, vec![])));
        assert_eq!(receive(&mut stream).unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        assert!(receive(&mut b"\0\0\0\0\0".as_slice()).is_err());
        assert!(receive(&mut b"O\xff\xff\xff\xff".as_slice()).is_err());
        assert!(receive(&mut b"O\x05\0\0\0abc".as_slice()).is_err());
        assert!(receive(&mut b"O\x05".as_slice()).is_err());
    }

    #[test]
    fn a_start_arrives_as_it_was_sent() {
        let start = Start {
            command: vec![b"sh".to_vec(), b"".to_vec(), b"-c \xff\n\"".to_vec()],
            environment: vec![b"A=b".to_vec()],
            directory: b"/home/user".to_vec(),
            outputs: vec![b"/out".to_vec(), b"/other".to_vec()],
            shares: vec![b"/share".to_vec()],
            terminal: Some((24, 80)),
        };
        assert_eq!(Start::from_bytes(&start.to_bytes()), start);
        let plain = Start { terminal: None, ..start };
        assert_eq!(Start::from_bytes(&plain.to_bytes()), plain);
    }

    #[test]
    fn a_window_size_arrives_as_it_was_sent() {
        assert_eq!(window_size_from_bytes(&window_size_to_bytes((50, 300))), Some((50, 300)));
        assert_eq!(window_size_from_bytes(b"abc"), None);
    }
}
