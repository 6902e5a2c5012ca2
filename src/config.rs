//! A machine's configuration as data, and the text formats in which users give its parts.
//!
//! Each value is checked here by itself; `vmm::Vmm::build` checks whether they fit together and this host.

pub mod device;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use device::{BadValue, DeviceSpec};

/// The kernel command line's beginning, unless the user leaves it out.
///
/// - `console=ttyS0`: the serial port is the only console.
/// - `8250.nr_uarts=1`: the kernel does not probe for the other three ports of a PC.
/// - `cryptomgr.notests`: the kernel does not test its ciphers. Debian's 6.12.117 does so at each boot: 38 %
///   of its instructions up to PID 1 (src/manual/speed.md).
/// - `panic=-1`: the kernel resets the machine at once when it panics; that ends the VMM.
/// - `reboot=panic_warm`: such a reset can be told from one that was asked for (`arch::x86_64::reset`).
pub const DEFAULT_CMDLINE: &str =
    "console=ttyS0 8250.nr_uarts=1 cryptomgr.notests panic=-1 reboot=panic_warm";

/// What is added to it with a debug-exit port, for the PID 1 of `scripts/image.sh`: it ends the machine with
/// its command's exit status.
pub const DEBUG_EXIT_CMDLINE: &str = "hotslot.debug_exit=0xf4";

/// A machine's configuration.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Config {
    pub kernel: PathBuf,
    /// One after the other.
    pub initramfs: Vec<PathBuf>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// Bytes of RAM.
    pub memory: u64,
    pub hugepages: HugePages,
    pub cpus: u32,
    /// The virtio devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceSpec>,
    pub serial: SerialLine,
    /// How long to wait for a back-end's socket.
    pub connect_timeout: Duration,
    pub debug_exit: bool,
    /// Where the picture of the machine's memory is written, if anywhere.
    pub memory_picture: Option<PathBuf>,
    pub unavailable_page: UnavailablePage,
    pub backend_loss: BackendLoss,
    /// Where to record what passes between the guest and the back-ends.
    pub trace: Option<PathBuf>,
    /// Where to wait for gdb before the guest's first instruction.
    pub gdb: Option<GdbAddress>,
    /// Where the machine's statistics are written, if anywhere.
    pub stats: Option<PathBuf>,
    /// The file for a dump of the machine.
    pub dump: Option<PathBuf>,
}

/// What of the guest's memory is in huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum HugePages {
    /// Nothing
    Off,
    /// What the kernel is loaded to
    #[default]
    Kernel,
    /// All of it, which is resident then
    All,
    /// All of it, from the host's pool (vm.nr_hugepages); it is resident then
    Hugetlb,
}

/// What happens when the guest needs a page of a mapping that the host cannot provide (SHM-87).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum UnavailablePage {
    /// The vCPU tries again until the page can be had
    #[default]
    Wait,
    /// The machine ends with status 35
    Exit,
}

/// What happens when a device loses its back-end permanently (SHM-99).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BackendLoss {
    /// The device needs a reset, and the machine goes on
    #[default]
    Keep,
    /// The machine ends with status 40
    Exit,
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
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(SerialLine::Stdio),
            None if text == "off" => Ok(SerialLine::Off),
            Some(("file", path)) if !path.is_empty() => Ok(SerialLine::File(path.into())),
            _ => Err(BadValue::new("serial line", text, "stdio, off or file=PATH")),
        }
    }
}

/// Where gdb connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GdbAddress {
    /// This TCP port, of 127.0.0.1 only.
    Port(u16),
    /// This Unix socket, which is made.
    Unix(PathBuf),
}

impl FromStr for GdbAddress {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match (text.strip_prefix("unix:"), text.parse()) {
            (Some(path), _) if !path.is_empty() => Ok(GdbAddress::Unix(path.into())),
            (None, Ok(port)) if port > 0 && !text.starts_with('+') => Ok(GdbAddress::Port(port)),
            _ => Err(BadValue::new("address for gdb", text, "a port from 1 to 65535, or unix:PATH")),
        }
    }
}

/// A time span: a whole number, of seconds or with the unit `s` or `ms`.
pub fn parse_duration(text: &str) -> Result<Duration, BadValue> {
    let (number, unit): (_, fn(u64) -> Duration) = match text.strip_suffix("ms") {
        Some(number) => (number, Duration::from_millis),
        None => (text.strip_suffix('s').unwrap_or(text), Duration::from_secs),
    };
    let number = number.parse::<u64>().ok().filter(|_| !number.starts_with('+'));
    let wanted = "a whole number of seconds, as in 5s, or of milliseconds, as in 500ms";
    number.map(unit).ok_or_else(|| BadValue::new("time span", text, wanted))
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
    fn addresses_for_gdb() {
        assert_eq!("1234".parse(), Ok(GdbAddress::Port(1234)));
        assert_eq!("unix:/run/gdb".parse(), Ok(GdbAddress::Unix("/run/gdb".into())));
        for text in ["", "0", "+1", "65536", "localhost:1234", "unix:", "/run/gdb"] {
            assert!(text.parse::<GdbAddress>().is_err(), "{text}");
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
