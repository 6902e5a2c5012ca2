//! The picture of the memory of a machine that is configured and not built: `--print-layout=svg`.

use super::error::VmmError;
use super::memory_map::{places, registers};
use crate::arch::x86_64::layout;
use crate::config::device::DeviceSpec;
use crate::memory::{GuestRange, PAGE_SIZE, ram};
use crate::picture::memory::{Kind, Part, draw};
use crate::report::Failure;

/// No x86-64 processor has more bits of physical address.
const ADDRESS_BITS: u32 = 52;

/// The picture of a machine with so much memory and these devices. Their windows are missing: only the
/// back-ends know how large they are.
///
/// # Errors
///
/// There can be no such machine.
pub fn draw_layout(memory: u64, devices: &[DeviceSpec]) -> Result<String, Box<dyn Failure>> {
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
