//! `probe counter`: the driver of `examples/counter.rs`, the back-end of the lessons. It takes the device
//! from Linux' virtio-mmio, which has no driver for its type, and uses its registers and its window
//! through `/dev/mem`.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use crate::map::{Mapping, PAGE, physical};
use crate::outcome::{Outcome, failed};
use hotslot_guest::board::{SHM_BASE, START};

/// The device's type, of which VIRTIO knows none. As the kernel writes it.
const TYPE: &str = "0x003f";
/// Status (VIRTIO 1.3, section 4.2.2): 0 resets the device.
const STATUS: usize = 0x70;

/// Starts the device, and prints three times the number at `offset` of its window; or what is there after a
/// reset of the device, and after another start.
pub fn counter(offset: u64, then_reset: bool) -> Outcome<String> {
    let (name, address) = take()?;
    let (page, first) = physical(address, PAGE)?;
    let write = |register: usize, value| page.atomic_u32(first + register).store(value, Ordering::Release);
    let start = || {
        write(STATUS, 0);
        START.iter().for_each(|(register, value)| write(*register as usize, *value));
    };
    let half = |at| u64::from(page.atomic_u32(first + at as usize).load(Ordering::Acquire));
    start();
    let window = half(SHM_BASE + 4) << 32 | half(SHM_BASE);
    println!("registers at {address:#x}, window at {window:#x}");
    let (number, first) = physical(window + offset, 8)?;
    let number = Number(number, first);
    if then_reset {
        number.print("started");
        write(STATUS, 0);
        number.print("reset");
        start();
        number.print("started again");
    } else {
        for _ in 0..3 {
            number.print("count");
            sleep(Duration::from_millis(500));
        }
    }
    ask_linux("bind", &name)?;
    Ok("probe counter: done".to_owned())
}

/// A word in the window.
struct Number(Mapping, usize);

impl Number {
    fn print(&self, when: &str) {
        match self.0.atomic_u64(self.1).load(Ordering::Acquire) {
            u64::MAX => println!("{when}: all ones"),
            number => println!("{when}: {number}"),
        }
    }
}

/// Takes the device from Linux: its name there, and the address of its registers.
fn take() -> Outcome<(String, u64)> {
    let devices = Path::new("/sys/bus/virtio/devices");
    for entry in fs::read_dir(devices).map_err(failed("look at", devices))?.flatten() {
        let is_it = fs::read_to_string(entry.path().join("device")).is_ok_and(|kind| kind.trim() == TYPE);
        let Some(platform) = fs::canonicalize(entry.path()).ok().filter(|_| is_it) else { continue };
        let name = platform.parent().and_then(Path::file_name).unwrap_or_default();
        let name = name.to_string_lossy();
        let iomem = fs::read_to_string("/proc/iomem").map_err(failed("read", Path::new("/proc/iomem")))?;
        let line = iomem.lines().find(|line| line.ends_with(&*name));
        let address = line.and_then(|line| line.trim().split('-').next());
        let address = address.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let address = address.ok_or_else(|| format!("/proc/iomem does not have {name}"))?;
        ask_linux("unbind", &name)?;
        return Ok((name.into_owned(), address));
    }
    Err("there is no device of type 63: start hotslot with the back-end of the lessons".to_owned())
}

/// Has Linux' virtio-mmio let go of the device with this name, or take it (`bind`), which resets it.
fn ask_linux(what: &str, name: &str) -> Outcome<()> {
    let file = Path::new("/sys/bus/platform/drivers/virtio-mmio").join(what);
    fs::write(&file, name).map_err(failed("write to", &file))
}
