//! The picture of the machine's memory: of one that is not built (`--print-layout=svg`), and of one that runs
//! (`--memory-picture FILE`).
//!
//! The thread `memory-picture` writes the file, as `signals` and the end of the machine order it. It may wait
//! for the locks of all devices, and for a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::error::{VmmError, failed_to};
use super::memory_map::{MemoryMap, registers};
use crate::arch::x86_64::layout::{self, Place};
use crate::config::device::DeviceSpec;
use crate::memory::{GuestRange, PAGE_SIZE, ram};
use crate::picture::memory::{Kind, Part, draw};
use crate::report::{Failure, create};
use crate::sandbox::vmm::Kind as ThreadKind;
use crate::thread;

/// How long the end of the machine waits for the last picture.
const LAST_PICTURE: Duration = Duration::from_secs(1);

/// No x86-64 processor has more bits of physical address.
const ADDRESS_BITS: u32 = 52;

/// The picture of a machine with so much memory and these devices. Their windows are missing: only the
/// back-ends know how large they are.
///
/// # Errors
///
/// There can be no such machine.
pub fn of_layout(memory: u64, devices: &[DeviceSpec]) -> Result<String, Box<dyn Failure>> {
    let end = memory.saturating_add(layout::GAP_END - layout::GAP);
    if end > 1 << ADDRESS_BITS {
        return Err(VmmError::AddressWidth { end, bits: ADDRESS_BITS }.into());
    }
    if devices.len() > layout::MAX_DEVICES {
        return Err(VmmError::TooManyDevices(devices.len()).into());
    }
    let ranges = ram::ranges(memory, layout::GAP, layout::GAP_END)?;
    let windows = layout::windows_start(ranges.last().map_or(0, |range| range.last() + 1));
    let mut parts: Vec<_> = ranges.into_iter().map(|range| Part::new(range, Kind::Ram, "RAM")).collect();
    parts[0].inside = places(&layout::BOOT, Kind::Boot).collect();
    parts.extend(places(&layout::FIXED, Kind::Fixed));
    let pages = (0..).map_while(layout::virtio_device);
    parts.extend(devices.iter().zip(pages).filter_map(|(device, (address, _gsi))| {
        GuestRange::new(address, PAGE_SIZE).map(|page| registers(page, &device.name))
    }));
    Ok(draw("Guest physical memory as configured", parts, Some(windows)))
}

fn places(places: &[Place], kind: Kind) -> impl Iterator<Item = Part> {
    let range = |start, len| GuestRange::new(start, len);
    places.iter().filter_map(move |&(name, start, len)| Some(Part::new(range(start, len)?, kind, name)))
}

/// The file for the picture of a running machine.
pub(super) struct PictureFile {
    path: PathBuf,
    file: File,
}

impl PictureFile {
    /// Creates or empties it. Refuses what cannot be written anew, such as a pipe.
    pub fn create(path: &Path) -> Result<PictureFile, VmmError> {
        let failed = |error| VmmError::PictureFile(path.to_owned(), error);
        if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
            return Err(failed(io::Error::other("it is not a regular file, which each picture needs anew")));
        }
        Ok(PictureFile { path: path.to_owned(), file: create(path).map_err(failed)? })
    }

    fn write(&self, map: &MemoryMap) {
        let parts = map.parts().into_iter().chain(places(&layout::FIXED, Kind::Fixed)).collect();
        let picture = draw("Guest physical memory of a running machine", parts, None);
        let empty = || self.file.set_len(0);
        if let Err(error) = empty().and_then(|()| self.file.write_all_at(picture.as_bytes(), 0)) {
            log::warn!("cannot write the memory picture {}: {error}", self.path.display());
            // Rather none than a part of one.
            let _ = empty();
        }
    }
}

/// Orders for the thread that writes the picture.
pub(super) struct Painter {
    /// Lock order: alone; never held while a picture is drawn.
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Default)]
struct Orders {
    given: u64,
    /// How many of them a finished picture is newer than.
    done: u64,
}

impl Painter {
    /// Starts the thread.
    pub fn start(file: PictureFile, map: Arc<MemoryMap>) -> Result<Arc<Painter>, VmmError> {
        let painter = Arc::new(Painter { orders: Mutex::default(), changed: Condvar::new() });
        let orders = Arc::clone(&painter);
        thread::spawn("memory-picture".into(), ThreadKind::Painter, move || {
            loop {
                let given = orders.wait();
                file.write(&map);
                orders.lock().done = given;
                orders.changed.notify_all();
            }
        })
        .map_err(failed_to("start the thread for the memory picture"))?;
        Ok(painter)
    }

    /// Orders a picture, and waits for nothing.
    pub fn order(&self) {
        self.lock().given += 1;
        self.changed.notify_all();
    }

    /// Orders the last picture, and waits until [`LAST_PICTURE`].
    pub fn order_last(&self) {
        self.order();
        let is_late = |orders: &mut Orders| orders.done < orders.given;
        let waited = self.changed.wait_timeout_while(self.lock(), LAST_PICTURE, is_late);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            log::warn!("the memory picture is out of date: it was not written in {LAST_PICTURE:?}");
        }
    }

    /// Waits for an order.
    fn wait(&self) -> u64 {
        let is_idle = |orders: &mut Orders| orders.done == orders.given;
        self.changed.wait_while(self.lock(), is_idle).unwrap_or_else(PoisonError::into_inner).given
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
