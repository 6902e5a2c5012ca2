//! A machine's configuration as data, and the text formats in which users give its parts.
//!
//! Each value is checked here by itself; `vmm::Vmm::build` checks whether they fit together and this host.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use crate::vhost_user::frontend::DeviceSpec;
use crate::vhost_user::kind::{DeviceKind, UnknownKind};
use crate::vhost_user::message::protocol_features::SHMEM_BIT;

/// The kernel command line's beginning, unless the user leaves it out.
///
/// - `console=ttyS0`: the serial port is the only console.
/// - `8250.nr_uarts=1`: the kernel does not probe for the other three ports of a PC.
/// - `panic=-1`: the kernel resets the machine at once when it panics; that ends the VMM.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 8250.nr_uarts=1 panic=-1";

/// A machine's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The kernel: an ELF vmlinux or a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of processors.
    pub cpus: u32,
    /// The virtio devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceSpec>,
    /// The host's side of the serial port.
    pub serial: SerialLine,
    /// How long to wait for a back-end's socket.
    pub connect_timeout: Duration,
    /// Whether there is a debug-exit port.
    pub debug_exit: bool,
}

/// Why a text is not what it should be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A device string without its beginning.
    #[error("no socket path: a device is PATH,type=TYPE and then further KEY=VALUE")]
    NoPath,
    /// A device string without its type.
    #[error("no type for the device at {0}: add type=fs, type=pmem, ... or type=NUMBER")]
    NoType(PathBuf),
    /// A part of a device string without an equals sign.
    #[error("`{0}` is not of the form KEY=VALUE")]
    NotAPair(String),
    /// A key that nobody knows.
    #[error("unknown key `{0}`: known are {KEYS}")]
    UnknownKey(String),
    /// A key that is planned.
    #[error("`{0}` is not supported yet")]
    NotYet(String),
    /// A key twice.
    #[error("`{0}` is given twice")]
    Twice(String),
    /// A device type that we do not know.
    #[error(transparent)]
    Type(#[from] UnknownKind),
    /// A value of the wrong kind.
    #[error("`{value}` is not a good {key}: {wanted}")]
    BadValue {
        /// What it was meant to be.
        key: &'static str,
        /// What it is.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
}

const KEYS: &str = "type, name, queues, queue-size, shmem-bit, share-shmem, shmem-rate";

/// The largest queue that a driver may choose where the user does not say otherwise: what most of QEMU's
/// devices have.
const QUEUE_SIZE: u16 = 256;

impl FromStr for DeviceSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut parts = text.split(',');
        let path = parts.next().unwrap_or_default();
        // A path with an equals sign is possible; a forgotten one is more likely.
        if path.is_empty() || TYPE_OR_KEY.iter().any(|key| path.starts_with(key)) {
            return Err(ConfigError::NoPath);
        }
        let socket = PathBuf::from(path);
        let (mut kind, mut name, mut queues, mut queue_size) = (None, None, None, None);
        let (mut shmem_bit, mut share_shmem, mut shmem_rate) = (None, None, None);
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| ConfigError::NotAPair(part.into()))?;
            let twice = match key {
                "type" => kind.replace(value.parse::<DeviceKind>()?).is_some(),
                "name" => name.replace(parse_name(value)?).is_some(),
                "queues" => queues.replace(parse_queues(value)?).is_some(),
                "queue-size" => queue_size.replace(parse_queue_size(value)?).is_some(),
                "shmem-bit" => shmem_bit.replace(parse_shmem_bit(value)?).is_some(),
                "share-shmem" => share_shmem.replace(parse_share_shmem(value)?).is_some(),
                "shmem-rate" => shmem_rate.replace(parse_shmem_rate(value)?).is_some(),
                "reconnect" => return Err(ConfigError::NotYet(key.into())),
                _ => return Err(ConfigError::UnknownKey(key.into())),
            };
            if twice {
                return Err(ConfigError::Twice(key.into()));
            }
        }
        let name = name.unwrap_or_else(|| {
            let file_name = socket.file_name().unwrap_or(socket.as_os_str());
            file_name.to_string_lossy().into_owned()
        });
        Ok(DeviceSpec {
            kind: kind.ok_or_else(|| ConfigError::NoType(socket.clone()))?,
            socket,
            name,
            queues,
            queue_size: queue_size.unwrap_or(QUEUE_SIZE),
            shmem_bit: shmem_bit.unwrap_or(SHMEM_BIT),
            share_shmem: share_shmem.unwrap_or(false),
            shmem_rate,
        })
    }
}

/// What a device string starts with if its path was forgotten.
const TYPE_OR_KEY: [&str; 7] =
    ["type=", "name=", "queues=", "queue-size=", "shmem-bit=", "share-shmem=", "shmem-rate="];

fn bad(key: &'static str, value: &str, wanted: &'static str) -> ConfigError {
    ConfigError::BadValue { key, value: value.into(), wanted }
}

fn parse_name(value: &str) -> Result<String, ConfigError> {
    if value.is_empty() {
        return Err(bad("name", value, "it is what messages call the device"));
    }
    Ok(value.into())
}

fn parse_queues(value: &str) -> Result<u16, ConfigError> {
    let number = value.parse().ok().filter(|number| (1..=256).contains(number));
    number.ok_or_else(|| bad("queues", value, "it is a number from 1 to 256"))
}

fn parse_queue_size(value: &str) -> Result<u16, ConfigError> {
    let power = |number: &u16| number.is_power_of_two() && *number <= 32768;
    let number = value.parse().ok().filter(power);
    number.ok_or_else(|| bad("queue-size", value, "it is a power of two up to 32768"))
}

fn parse_shmem_bit(value: &str) -> Result<u32, ConfigError> {
    let number = value.parse().ok().filter(|number| (20..=22).contains(number));
    number.ok_or_else(|| bad("shmem-bit", value, "it is 22, or a draft's 20 or 21"))
}

fn parse_share_shmem(value: &str) -> Result<bool, ConfigError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(bad("share-shmem", value, "it is on or off")),
    }
}

fn parse_shmem_rate(value: &str) -> Result<NonZeroU32, ConfigError> {
    let number = value.parse();
    number.map_err(|_| bad("shmem-rate", value, "it is a number of requests a second, from 1"))
}

/// The host's side of the serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialLine {
    /// stdin and stdout.
    Stdio,
    /// Output is dropped, and there is no input.
    Off,
    /// Output goes to this file, which is created or emptied.
    File(PathBuf),
}

impl FromStr for SerialLine {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(SerialLine::Stdio),
            None if text == "off" => Ok(SerialLine::Off),
            Some(("file", path)) if !path.is_empty() => Ok(SerialLine::File(path.into())),
            _ => Err(bad("serial line", text, "it is stdio, off or file=PATH")),
        }
    }
}

/// A time span: a whole number, of seconds or with the unit `s` or `ms`.
pub fn parse_duration(text: &str) -> Result<Duration, ConfigError> {
    let (number, unit): (_, fn(u64) -> Duration) = match text.strip_suffix("ms") {
        Some(number) => (number, Duration::from_millis),
        None => (text.strip_suffix('s').unwrap_or(text), Duration::from_secs),
    };
    let number = number.parse::<u64>().ok().filter(|_| !number.starts_with('+'));
    number.map(unit).ok_or_else(|| {
        bad("time span", text, "it is a whole number of seconds, as in 5s, or of milliseconds, as in 500ms")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_in_short_and_at_length() {
        let device: DeviceSpec = "/run/pmem.sock,type=pmem".parse().unwrap();
        assert_eq!(
            device,
            DeviceSpec {
                socket: "/run/pmem.sock".into(),
                kind: "pmem".parse().unwrap(),
                name: "pmem.sock".into(),
                queues: None,
                queue_size: QUEUE_SIZE,
                shmem_bit: 22,
                share_shmem: false,
                shmem_rate: None,
            }
        );
        let device: DeviceSpec =
            "a=b.sock,queues=3,type=26,share-shmem=on,queue-size=128,shmem-bit=20,shmem-rate=100,name=share"
                .parse()
                .unwrap();
        assert!(device.share_shmem);
        assert_eq!(device.shmem_rate, NonZeroU32::new(100));
        let device_off: DeviceSpec = "a,type=fs,share-shmem=off".parse().unwrap();
        assert!(!device_off.share_shmem);
        assert_eq!(device.socket, PathBuf::from("a=b.sock"));
        assert_eq!((device.kind.id(), device.name.as_str()), (26, "share"));
        assert_eq!((device.queues, device.queue_size, device.shmem_bit), (Some(3), 128, 20));
    }

    #[test]
    fn wrong_devices_are_refused_by_name() {
        for (text, part) in [
            ("", "no socket path"),
            (",type=fs", "no socket path"),
            ("type=fs", "no socket path"),
            ("a.sock", "no type for the device at a.sock"),
            ("a.sock,type=disk", "`disk` is no device type"),
            ("a.sock,type=0", "`0` is no device type"),
            ("a.sock,type=fs,colour=red", "unknown key `colour`"),
            ("a.sock,type=fs,queues", "`queues` is not of the form"),
            ("a.sock,type=fs,queues=0", "`0` is not a good queues"),
            ("a.sock,type=fs,queues=257", "`257` is not a good queues"),
            ("a.sock,type=fs,queue-size=100", "`100` is not a good queue-size"),
            ("a.sock,type=fs,shmem-bit=19", "`19` is not a good shmem-bit"),
            ("a.sock,type=fs,name=", "`` is not a good name"),
            ("a.sock,type=fs,type=fs", "`type` is given twice"),
            ("a.sock,type=fs,reconnect=5", "`reconnect` is not supported yet"),
            ("a.sock,type=fs,share-shmem=yes", "`yes` is not a good share-shmem: it is on or off"),
            ("a.sock,type=fs,shmem-rate=0", "`0` is not a good shmem-rate"),
            ("a.sock,type=fs,shmem-rate=-1", "`-1` is not a good shmem-rate"),
            ("a.sock,share-shmem=on,type=fs,share-shmem=on", "`share-shmem` is given twice"),
        ] {
            let error = text.parse::<DeviceSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn serial_lines() {
        assert_eq!("stdio".parse(), Ok(SerialLine::Stdio));
        assert_eq!("off".parse(), Ok(SerialLine::Off));
        assert_eq!("file=a=b".parse(), Ok(SerialLine::File("a=b".into())));
        for text in ["", "on", "file", "file=", "pty"] {
            assert!(text.parse::<SerialLine>().is_err(), "{text}");
        }
    }

    #[test]
    fn time_spans() {
        assert_eq!(parse_duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for text in ["", "s", "ms", "-1", "+1", "1.5s", "5m", "soon"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
