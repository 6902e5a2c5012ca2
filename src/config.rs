//! What a machine shall be: the configuration as data, and the text formats in which users give it.
//!
//! What can be said about a value alone is checked here; whether a machine can be made of them all is for
//! `vmm::Vmm::build` to find out.

pub mod device;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use device::DeviceSpec;
use thiserror::Error;

use crate::size;

/// The kernel command line's beginning, unless the user leaves it out.
///
/// - `console=ttyS0`: the serial port is all there is.
/// - `8250.nr_uarts=1`: the other three that a PC may have are not looked for.
/// - `panic=-1`: a panic is followed by a reset at once, which ends the VMM with its status.
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

impl Config {
    /// A machine with one processor, 512 MiB, no devices and no serial line: a start for tests.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Config {
            kernel: kernel.into(),
            initramfs: None,
            cmdline: DEFAULT_CMDLINE.into(),
            memory: 512 << 20,
            cpus: 1,
            devices: Vec::new(),
            serial: SerialLine::Off,
            connect_timeout: Duration::from_secs(5),
            debug_exit: false,
        }
    }
}

/// Why a text is not what it should be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
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

fn bad(key: &'static str, value: &str, wanted: &'static str) -> ConfigError {
    ConfigError::BadValue { key, value: value.into(), wanted }
}

/// The host's side of the serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialLine {
    /// stdin and stdout.
    Stdio,
    /// Nobody: output is dropped.
    Off,
    /// Output goes to this file, which is made or emptied.
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

/// A size of RAM.
pub fn parse_memory(text: &str) -> Result<u64, size::SizeError> {
    size::parse(text)
}

#[cfg(test)]
mod tests {
    use super::*;

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
