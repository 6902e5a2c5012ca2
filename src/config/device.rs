//! A device as the user asks for it: `PATH,type=TYPE[,KEY=VALUE]...`.
//!
//! `KEYS` has each key once. The parser, the error messages and the help text are made of it.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use crate::report::clean;
use crate::size;
use crate::virtio::kind::{self, DeviceKind, MAX_QUEUES, UnknownKind};

/// The configuration space that a register page has room for (VIRTIO section 4.2.2: it begins at 0x100).
pub const MAX_CONFIG: usize = 0xf00;

/// VIRTIO section 5.11.4: a tag's bytes.
const MAX_TAG: usize = 36;

/// The characters of a name: it is in each message about the device.
const MAX_NAME: usize = 64;

/// SHMEM's protocol feature bit in the merged specification; drafts had 20 and 21 (SHM-1).
pub const SHMEM_BIT: u32 = 22;

/// The bytes that a back-end may map at a time where the user does not say otherwise. KVM without hardware
/// virtualization keeps 160 MiB for so much.
const SHMEM_LIMIT: u64 = 64 << 30;

/// A device of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DeviceSpec {
    /// Its name in messages.
    pub name: String,
    /// The socket that its back-end listens on.
    pub socket: PathBuf,
    pub kind: DeviceKind,
    /// `None` for what the type means and the back-end says.
    pub queues: Option<u16>,
    /// The largest queue size that the driver may choose: a power of two up to 32768. `None` for what is
    /// usual for the type.
    pub queue_size: Option<u16>,
    /// How many bytes of configuration space the back-end has; `None` for what the type means.
    pub config_size: Option<u16>,
    /// The configuration space, where the back-end is not to be asked for it.
    pub config: Option<Vec<u8>>,
    /// A network device's address.
    pub mac: Option<[u8; 6]>,
    /// A file system's name: 1 to 36 bytes.
    pub tag: Option<String>,
    /// Id and size of the only shared memory region, where the back-end does not say.
    pub shmem: Option<(u8, u64)>,
    /// The protocol feature bit that means SHMEM: 22, or 20 or 21 for a back-end built from a draft (SHM-1).
    pub shmem_bit: u32,
    /// Whether other devices' back-ends see what this one's maps (SHM-80).
    pub share_shmem: bool,
    /// How many requests of the backend channel are served in a second; `None` for as many as come (SHM-66).
    pub shmem_rate: Option<NonZeroU32>,
    /// How many bytes its back-end may map at a time (SHM-85).
    pub shmem_limit: u64,
    /// Whether its back-end may map files that need another process or the network (SHM-83).
    pub foreign_files: bool,
    /// Whether the page tables of its mappings are filled before its back-end is answered (SHM-105).
    pub prefault: bool,
    /// How long its back-end may be away when it dies; `None` where it is lost at once (SHM-94).
    pub reconnect: Option<Duration>,
}

impl DeviceSpec {
    /// The largest queue size to ask the back-end for.
    pub fn wanted_queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(self.kind.queue_size())
    }
}

/// A key of a device string.
struct Key {
    name: &'static str,
    /// The value in the help text.
    value: &'static str,
    /// What the value must be.
    wanted: &'static str,
    help: &'static str,
    /// Sets the value; `None` where it is not as wanted.
    set: fn(&mut DeviceSpec, &str) -> Option<()>,
}

const KEYS: &[Key] = &[
    Key {
        name: "type",
        value: "TYPE",
        wanted: "a device type",
        help: "what the device is",
        set: |spec, text| text.parse().map(|kind| spec.kind = kind).ok(),
    },
    Key {
        name: "name",
        value: "NAME",
        wanted: "1 to 64 characters for messages, without control characters",
        help: "instead of the socket's file name",
        set: |spec, text| {
            let is_good = (1..=MAX_NAME).contains(&text.chars().count()) && !text.contains(char::is_control);
            is_good.then(|| spec.name = text.to_string())
        },
    },
    Key {
        name: "queues",
        value: "N",
        wanted: "a number from 1 to 256",
        help: "how many queues it has, if not as many as the back-end says and the type means",
        set: |spec, text| number(text, 1..=MAX_QUEUES).map(|count| spec.queues = Some(count)),
    },
    Key {
        name: "queue-size",
        value: "N",
        wanted: "a power of two up to 32768",
        help: "the largest queue that the driver may choose, if not what is usual for the type, or less where the \
               back-end takes less",
        set: |spec, text| {
            let size = number(text, 1..=32768).filter(|size: &u16| size.is_power_of_two());
            size.map(|size| spec.queue_size = Some(size))
        },
    },
    Key {
        name: "config-size",
        value: "N",
        wanted: "a number of bytes from 0 to 3840",
        help: "how many bytes of configuration space the back-end has, if not as many as the type means; it is asked \
               for these, and for none with 0",
        set: |spec, text| number(text, 0..=MAX_CONFIG as u16).map(|size| spec.config_size = Some(size)),
    },
    Key {
        name: "config",
        value: "HEX",
        wanted: "an even number of hexadecimal digits, for up to 3840 bytes",
        help: "the bytes of the configuration space, instead of asking the back-end",
        set: |spec, text| hex(text, text.len() / 2).map(|bytes| spec.config = Some(bytes)),
    },
    Key {
        name: "mac",
        value: "MAC",
        wanted: "six bytes as in 52:54:00:12:34:56, the first of them even, and not all of them 0",
        help: "a network device's address, instead of one that the back-end or the driver chooses",
        set: |spec, text| {
            let bytes: Vec<u8> = text.split(':').map(|part| Some(hex(part, 1)?[0])).collect::<Option<_>>()?;
            // An odd first byte is an address of a group.
            let mac = <[u8; 6]>::try_from(bytes).ok().filter(|mac| mac[0] % 2 == 0 && *mac != [0; 6]);
            mac.map(|mac| spec.mac = Some(mac))
        },
    },
    Key {
        name: "tag",
        value: "NAME",
        wanted: "a name of 1 to 36 bytes",
        help: "the name by which the guest mounts a file system, instead of the one that the back-end says",
        set: |spec, text| (1..=MAX_TAG).contains(&text.len()).then(|| spec.tag = Some(text.to_string())),
    },
    Key {
        name: "shmem",
        value: "SHMID:SIZE",
        wanted: "an id up to 255 and a size of whole pages, as in 1:256M",
        help: "the shared memory region of a back-end that leaves its size to the front-end",
        set: |spec, text| {
            let (shmid, size) = text.split_once(':')?;
            let size = size::parse(size).ok().filter(|size| *size > 0 && size % 4096 == 0)?;
            number(shmid, 0..=255).map(|shmid| spec.shmem = Some((shmid, size)))
        },
    },
    Key {
        name: "shmem-bit",
        value: "N",
        wanted: "22, or a draft's 20 or 21",
        help: "the protocol feature bit that means SHMEM to the back-end",
        set: |spec, text| number(text, 20..=22).map(|bit| spec.shmem_bit = bit),
    },
    Key {
        name: "share-shmem",
        value: "on",
        wanted: "on or off",
        help: "shows what this device's back-end maps to the back-ends of the other devices, so that the guest can use \
               it for their requests (O_DIRECT from a DAX file to a disk)",
        set: |spec, text| {
            spec.share_shmem = text == "on";
            ["on", "off"].contains(&text).then_some(())
        },
    },
    Key {
        name: "shmem-rate",
        value: "N",
        wanted: "a number of requests a second, from 1",
        help: "carries out no more than N requests of this device's back-end to map or unmap in a second, evenly \
               spread: each holds up the guest's processors for a moment. Without it there is no limit",
        set: |spec, text| text.parse().map(|rate| spec.shmem_rate = Some(rate)).ok(),
    },
    Key {
        name: "shmem-limit",
        value: "SIZE",
        wanted: "a size from 4K, as in 128G",
        help: "lets this device's back-end map no more than SIZE at a time, if not 64G. A KVM without hardware \
               virtualization takes about 2.5M of the host's memory for each 1G",
        set: |spec, text| {
            size::parse(text).ok().filter(|&size| size >= 4096).map(|size| spec.shmem_limit = size)
        },
    },
    Key {
        name: "foreign-files",
        value: "on",
        wanted: "on or off",
        help: "lets this device's back-end map files that need another process or the network (FUSE, NFS). Where their \
               server does not answer, the guest and hotslot can wait without end",
        set: |spec, text| {
            spec.foreign_files = text == "on";
            ["on", "off"].contains(&text).then_some(())
        },
    },
    Key {
        name: "prefault",
        value: "on",
        wanted: "on or off",
        help: "fills the page tables of each mapping before the back-end is answered: the guest's first read of a page \
               costs no fault where KVM can fill its own, and the answer waits until the file's pages are read in",
        set: |spec, text| {
            spec.prefault = text == "on";
            ["on", "off"].contains(&text).then_some(())
        },
    },
    Key {
        name: "reconnect",
        value: "SECONDS",
        wanted: "a number of seconds from 1 to 86400",
        help: "when this device's back-end dies or does not answer, waits so long for it to come back on its socket, and \
               goes on with it where the device was; the guest notices a pause",
        set: |spec, text| {
            number(text, 1..=86400).map(|seconds| spec.reconnect = Some(Duration::from_secs(seconds)))
        },
    },
];

/// A number in a range.
fn number<T: FromStr + PartialOrd>(text: &str, range: std::ops::RangeInclusive<T>) -> Option<T> {
    text.parse().ok().filter(|number| range.contains(number))
}

/// `len` bytes out of pairs of hexadecimal digits.
fn hex(text: &str, len: usize) -> Option<Vec<u8>> {
    let is_hex = text.bytes().all(|digit| digit.is_ascii_hexdigit());
    let fits = (1..=MAX_CONFIG).contains(&len) && text.len() == 2 * len;
    let bytes = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).ok();
    if is_hex && fits { (0..text.len()).step_by(2).map(bytes).collect() } else { None }
}

/// The help text of the option that takes a device string.
pub fn help() -> String {
    let mut text = format!(
        "Add a virtio device whose back-end listens on a Unix socket\n\n\
         PATH is the socket, TYPE is one of {}, or a number from 1 to 255. Can be given several times; the guest finds \
         the devices in this order.\n\nKeys:",
        kind::names()
    );
    for Key { name, value, wanted, help, .. } in KEYS {
        text += &format!("\n  {name}={value}: {help} ({wanted})");
    }
    text
}

/// Why a text is not what it should be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{value}` is not a good {key}: it is {wanted}")]
pub struct BadValue {
    key: &'static str,
    value: String,
    wanted: &'static str,
}

impl BadValue {
    pub(super) fn new(key: &'static str, value: &str, wanted: &'static str) -> Self {
        BadValue { key, value: value.into(), wanted }
    }
}

/// Why a text is not a device string.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DeviceStringError {
    #[error("no socket path: a device is PATH,type=TYPE and then further KEY=VALUE")]
    NoPath,
    #[error("no type for the device at {0}: add type=fs, type=pmem, ... or type=NUMBER")]
    NoType(PathBuf),
    #[error("`{0}` is not of the form KEY=VALUE")]
    NotAPair(String),
    #[error("`{0}` is a device type: say type={0}")]
    BareType(String),
    #[error("`{key}` is for a device with type={kind}, and this one has type={given}")]
    OtherType { key: &'static str, kind: &'static str, given: DeviceKind },
    #[error("unknown key `{0}`: known are {known}", known = names())]
    UnknownKey(String),
    #[error("`{0}` is given twice")]
    Twice(&'static str),
    #[error("`config`, `mac` or `tag` gives {len} bytes of configuration space, and `config-size` is {size}")]
    ConfigSize { len: usize, size: u16 },
    #[error(transparent)]
    Type(#[from] UnknownKind),
    #[error(transparent)]
    BadValue(#[from] BadValue),
}

fn names() -> String {
    KEYS.iter().map(|key| key.name).collect::<Vec<_>>().join(", ")
}

impl FromStr for DeviceSpec {
    type Err = DeviceStringError;

    fn from_str(text: &str) -> Result<Self, DeviceStringError> {
        let find = |name| KEYS.iter().find(|key| key.name == name);
        let mut parts = text.split(',');
        let path = parts.next().unwrap_or_default();
        // A path with an equals sign is possible; a forgotten path is more likely.
        let is_key = path.split_once('=').is_some_and(|(name, _)| find(name).is_some());
        if path.is_empty() || is_key {
            return Err(DeviceStringError::NoPath);
        }
        let mut given: Vec<(&Key, &str)> = Vec::new();
        for part in parts {
            let (name, value) = part.split_once('=').ok_or_else(|| match part.parse::<DeviceKind>() {
                Ok(_) => DeviceStringError::BareType(part.into()),
                Err(_) => DeviceStringError::NotAPair(part.into()),
            })?;
            let key = find(name).ok_or_else(|| DeviceStringError::UnknownKey(name.into()))?;
            if given.iter().any(|(other, _)| other.name == key.name) {
                return Err(DeviceStringError::Twice(key.name));
            }
            given.push((key, value));
        }
        let socket = PathBuf::from(path);
        // Without it there is no `DeviceSpec` to set the others in.
        let kind = given.iter().find(|(key, _)| key.name == "type");
        let (_, kind) = kind.ok_or_else(|| DeviceStringError::NoType(socket.clone()))?;
        let name = clean(&socket.file_name().unwrap_or(socket.as_os_str()).to_string_lossy());
        let mut spec = DeviceSpec {
            name: name.chars().take(MAX_NAME).collect(),
            socket,
            kind: kind.parse()?,
            queues: None,
            queue_size: None,
            config_size: None,
            config: None,
            mac: None,
            tag: None,
            shmem: None,
            shmem_bit: SHMEM_BIT,
            share_shmem: false,
            shmem_rate: None,
            shmem_limit: SHMEM_LIMIT,
            foreign_files: false,
            prefault: false,
            reconnect: None,
        };
        for (&Key { name, wanted, set, .. }, value) in given {
            set(&mut spec, value).ok_or_else(|| BadValue::new(name, value, wanted))?;
        }
        for (is_given, key, kind) in [(spec.mac.is_some(), "mac", "net"), (spec.tag.is_some(), "tag", "fs")] {
            if is_given && kind.parse() != Ok(spec.kind) {
                return Err(DeviceStringError::OtherType { key, kind, given: spec.kind });
            }
        }
        // Of size 0 it means: do not ask the back-end.
        if let Some(size) = spec.config_size.filter(|&size| size > 0) {
            let lens = [
                spec.config.as_ref().map(Vec::len),
                spec.mac.map(|mac| mac.len()),
                spec.tag.as_ref().map(|_| MAX_TAG),
            ];
            let len = lens.into_iter().flatten().max().unwrap_or(0);
            if len > size.into() {
                return Err(DeviceStringError::ConfigSize { len, size });
            }
        }
        Ok(spec)
    }
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
                queue_size: None,
                config_size: None,
                config: None,
                mac: None,
                tag: None,
                shmem: None,
                shmem_bit: 22,
                share_shmem: false,
                shmem_rate: None,
                shmem_limit: 64 << 30,
                foreign_files: false,
                prefault: false,
                reconnect: None,
            }
        );
        let device: DeviceSpec = format!("{},type=fs", "x".repeat(99)).parse().unwrap();
        assert_eq!(device.name.len(), 64);
        let device: DeviceSpec =
            "a=b.sock,queues=3,type=26,share-shmem=on,queue-size=128,shmem-bit=20,shmem-rate=100,name=share,reconnect=60"
                .parse()
                .unwrap();
        assert!(device.share_shmem);
        assert_eq!(device.shmem_rate, NonZeroU32::new(100));
        assert_eq!(device.reconnect, Some(Duration::from_secs(60)));
        let device_off: DeviceSpec = "a,type=fs,share-shmem=off".parse().unwrap();
        assert!(!device_off.share_shmem);
        let device_of_network: DeviceSpec = "a,type=fs,foreign-files=on,shmem-limit=128G".parse().unwrap();
        assert_eq!((device_of_network.foreign_files, device_of_network.shmem_limit), (true, 128 << 30));
        assert_eq!(device.socket, PathBuf::from("a=b.sock"));
        assert_eq!((device.kind.id(), device.name.as_str()), (26, "share"));
        assert_eq!((device.queues, device.queue_size, device.shmem_bit), (Some(3), Some(128), 20));
        let net: DeviceSpec = "a,type=net,mac=52:54:00:aB:00:ff,config-size=3840".parse().unwrap();
        assert_eq!((net.mac, net.config_size), (Some([0x52, 0x54, 0, 0xab, 0, 0xff]), Some(3840)));
        let share: DeviceSpec = "a,type=fs,tag=my share,config=00fFA0,shmem=1:256M".parse().unwrap();
        assert_eq!((share.tag.as_deref(), share.shmem), (Some("my share"), Some((1, 256 << 20))));
        assert_eq!(share.config, Some(vec![0, 0xff, 0xa0]));
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
            ("a.sock,pmem", "`pmem` is a device type: say type=pmem"),
            ("a.sock,26", "`26` is a device type: say type=26"),
            ("a.sock,type=fs,config-size=3841", "`3841` is not a good config-size"),
            ("a.sock,type=rng,config=001122,config-size=2", "gives 3 bytes of configuration space, and"),
            (
                "a.sock,type=fs,config-size=35,tag=a",
                "gives 36 bytes of configuration space, and `config-size` is 35",
            ),
            ("a.sock,type=net,mac=52:54:00:12:34:56,config-size=5", "gives 6 bytes"),
            ("a.sock,type=fs,config=", "`` is not a good config"),
            ("a.sock,type=fs,config=0", "`0` is not a good config"),
            ("a.sock,type=fs,config=0g", "`0g` is not a good config"),
            ("a.sock,type=fs,config=\u{e9}\u{e9}", "is not a good config"),
            ("a.sock,type=fs,tag=", "`` is not a good tag"),
            ("a.sock,type=fs,tag=0123456789012345678901234567890123456", "is not a good tag"),
            ("a.sock,type=blk,tag=a", "`tag` is for a device with type=fs, and this one has type=blk"),
            ("a.sock,type=blk,mac=52:54:00:12:34:56", "`mac` is for a device with type=net"),
            ("a.sock,type=net,mac=52:54:00:12:34", "is not a good mac"),
            ("a.sock,type=net,mac=53:54:00:12:34:56", "is not a good mac"),
            ("a.sock,type=net,mac=00:00:00:00:00:00", "is not a good mac"),
            ("a.sock,type=net,mac=5:54:00:12:34:56", "is not a good mac"),
            ("a.sock,type=gpu,shmem=1", "`1` is not a good shmem"),
            ("a.sock,type=gpu,shmem=256:1M", "`256:1M` is not a good shmem"),
            ("a.sock,type=gpu,shmem=1:0", "`1:0` is not a good shmem"),
            ("a.sock,type=gpu,shmem=1:100", "`1:100` is not a good shmem"),
            ("a.sock,type=fs,queues=0", "`0` is not a good queues"),
            ("a.sock,type=fs,queues=257", "`257` is not a good queues"),
            ("a.sock,type=fs,queue-size=100", "`100` is not a good queue-size"),
            ("a.sock,type=fs,shmem-bit=19", "`19` is not a good shmem-bit"),
            ("a.sock,type=fs,name=", "`` is not a good name"),
            (
                &format!("a.sock,type=fs,name={}", "x".repeat(65)),
                "is not a good name: it is 1 to 64 characters",
            ),
            ("a.sock,type=fs,name=a\nb", "without control characters"),
            ("a.sock,type=fs,type=fs", "`type` is given twice"),
            ("a.sock,type=fs,retry=5", "unknown key `retry`: known are type, name, queues, queue-size"),
            ("a.sock,type=fs,reconnect=0", "`0` is not a good reconnect: it is a number of seconds from 1"),
            ("a.sock,type=fs,reconnect=on", "`on` is not a good reconnect"),
            ("a.sock,type=fs,share-shmem=yes", "`yes` is not a good share-shmem: it is on or off"),
            ("a.sock,type=fs,shmem-rate=0", "`0` is not a good shmem-rate"),
            ("a.sock,type=fs,shmem-rate=-1", "`-1` is not a good shmem-rate"),
            ("a.sock,type=fs,shmem-limit=4095", "`4095` is not a good shmem-limit: it is a size from 4K"),
            ("a.sock,type=fs,shmem-limit=lots", "`lots` is not a good shmem-limit"),
            ("a.sock,type=fs,prefault=1", "`1` is not a good prefault: it is on or off"),
            ("a.sock,type=fs,foreign-files=1", "`1` is not a good foreign-files: it is on or off"),
            ("a.sock,share-shmem=on,type=fs,share-shmem=on", "`share-shmem` is given twice"),
        ] {
            let error = text.parse::<DeviceSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_help_has_every_key_and_every_named_type() {
        let help = help();
        for part in
            ["shmem-bit=N", "22, or a draft's 20 or 21", "share-shmem=on", "net, blk, console", "pmem"]
        {
            assert!(help.contains(part), "{help}");
        }
    }
}
