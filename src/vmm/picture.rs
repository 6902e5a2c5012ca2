//! The picture of the machine's memory: of one that is not built (`--print-layout=svg`), and of one that runs
//! (`--memory-picture FILE`).
//!
//! The thread `memory-picture` writes the file, as `signals` and the end of the machine order it. It may wait
//! for the locks of all devices, and for a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::error::{VmmError, failed_to};
use super::memory_map::{MemoryMap, registers};
use super::writer::Writer;
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

    /// Starts the thread.
    pub fn start(self, map: Arc<MemoryMap>) -> Result<Arc<Writer>, VmmError> {
        let painter = Arc::<Writer>::default();
        let orders = Arc::clone(&painter);
        thread::spawn("memory-picture".into(), ThreadKind::Painter, move || {
            orders.serve(|| self.write(&map))
        })
        .map_err(failed_to("start the thread for the memory picture"))?;
        Ok(painter)
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

/// Orders the last picture, and waits until [`LAST_PICTURE`].
pub(super) fn finish(painter: &Writer) {
    painter.order();
    if !painter.wait(LAST_PICTURE) {
        log::warn!("the memory picture is out of date: it was not written in {LAST_PICTURE:?}");
    }
}
