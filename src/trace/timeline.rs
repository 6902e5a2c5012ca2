//! A trace as a time line in SVG (`hotslot trace FILE --timeline`): for each shared memory region its
//! mappings, time from left to right and offsets from top to bottom.
//!
//! A mapping is a box from its MAP to its end. Offsets at which nothing was mapped are cut short.

use std::collections::{BTreeMap, BTreeSet};

use super::record::{Message, Outcome, Record, What};
use super::text::{happened, request, result, seconds};
use crate::picture::canvas::{Anchor, Canvas, LINE, MARGIN, WIDTH, columns_in, fit, wrap};
use crate::size;

/// The flag of SHMEM_MAP for a mapping that the guest may write to (vhost-user, VHOST_USER_FLAG_MAP_RW).
const READ_WRITE: u64 = 1;

/// The offsets end where the time line starts.
const LEFT: u32 = MARGIN + 134;
const RIGHT: u32 = WIDTH - MARGIN;
/// A stretch of offsets is at least and at most so high.
const LOWEST: u32 = LINE + 2;
const HIGHEST: u64 = 40;
/// How many stretches of offsets a region's time line shows.
const MOST_STRETCHES: usize = 40;
/// How many refusals and events are listed below it.
const MOST_REMARKS: usize = 20;

const LEGEND: &str = "A cross is a refused request, a dashed line an event, a thin line mappings that lived for a \
                      moment. Offsets at which nothing was mapped are cut short.";

/// Draws all of it.
pub fn draw(records: &[Record]) -> String {
    let ended = |record: &Record| record.time_ns.saturating_add(record.took_ns);
    let first = records.first().map_or(0, |record| record.time_ns);
    let last = records.iter().map(ended).max().unwrap_or(0);
    let mut records: Vec<&Record> = records.iter().collect();
    records.sort_by_key(|record| ended(record));
    let mut regions = Regions::default();
    for record in records {
        regions.add(record, ended(record));
    }
    let mut canvas = Canvas::new("Mappings of the shared memory regions");
    let mut y = MARGIN + 3 * LINE;
    if regions.0.is_empty() {
        canvas.text("ink", Anchor::Start, MARGIN, y, "The trace has no shared memory region and no mapping.");
        y += LINE;
    }
    for ((device, shmid), region) in &regions.0 {
        let mut name = format!("{device}, region {shmid}");
        if let Some((address, size)) = region.place {
            name = format!("{name}: {} at {address:#x}", size::text(size));
        }
        canvas.text("title", Anchor::Start, MARGIN, y, &fit(&name, columns_in(WIDTH - 2 * MARGIN)));
        let mut chart = Chart { canvas, y: y + LINE, times: Times { first, last }, rows: Vec::new() };
        chart.region(region);
        (canvas, y) = (chart.canvas, chart.y + 2 * LINE);
    }
    for line in wrap(LEGEND, columns_in(WIDTH - 2 * MARGIN)) {
        canvas.text("soft", Anchor::Start, MARGIN, y, &line);
        y += LINE;
    }
    canvas.finish(y)
}

struct Mapping {
    start: u64,
    end: u64,
    file_offset: u64,
    is_writable: bool,
    from_ns: u64,
    /// `u64::MAX` while it lives.
    to_ns: u64,
}

/// A refused request, or an event.
struct Remark {
    ns: u64,
    /// Where a refused request was to map.
    refused_at: Option<u64>,
    text: String,
}

#[derive(Default)]
struct Region {
    /// Guest address and size.
    place: Option<(u64, u64)>,
    /// Those that live, by their start (no two overlap), and those that ended.
    living: BTreeMap<u64, Mapping>,
    ended: Vec<Mapping>,
    remarks: Vec<Remark>,
}

impl Region {
    /// Ends the living mappings that began before a time.
    fn end_older(&mut self, ns: u64, than_ns: u64) {
        let all = std::mem::take(&mut self.living).into_iter();
        let (ended, living): (BTreeMap<_, _>, _) = all.partition(|(_, mapping)| mapping.from_ns < than_ns);
        self.living = living;
        self.ended.extend(ended.into_values().map(|mapping| Mapping { to_ns: ns, ..mapping }));
    }

    /// Ends the living mappings that overlap these offsets.
    fn end_at(&mut self, ns: u64, start: u64, end: u64) {
        // From the last one back: the ends are in the order of the starts.
        while let Some(last) = self.living.range(..end).next_back()
            && start < last.1.end
        {
            let at = *last.0;
            self.ended.extend(self.living.remove(&at).map(|mapping| Mapping { to_ns: ns, ..mapping }));
        }
    }

    fn mappings(&self) -> impl Iterator<Item = &Mapping> + Clone {
        self.ended.iter().chain(self.living.values())
    }
}

/// By device and shmid.
#[derive(Default)]
struct Regions<'a>(BTreeMap<(&'a str, u64), Region>);

impl<'a> Regions<'a> {
    /// Adds a record that ended at `ns`; those that ended before it are there.
    fn add(&mut self, record: &'a Record, ns: u64) {
        let Some(device) = record.device.as_deref() else { return };
        match &record.what {
            What::Message(message) if message.name.contains("SHMEM_") => self.request(device, message, ns),
            What::Event(event) => {
                if let (Some(shmid), Some(address), Some(size)) = (
                    event.fields.number("shmid"),
                    event.fields.number("guest_address"),
                    event.fields.number("size"),
                ) {
                    self.0.entry((device, shmid)).or_default().place = Some((address, size));
                    return;
                }
                for (_, region) in self.0.iter_mut().filter(|((of, _), _)| *of == device) {
                    // When the back-end before this one was gone.
                    let gone = region.remarks.iter().rfind(|remark| remark.text.starts_with("gone"));
                    let gone = gone.map_or(0, |remark| remark.ns);
                    match event.event.as_str() {
                        "reset" => region.end_older(ns, u64::MAX),
                        "old-mappings-gone" => region.end_older(ns, gone),
                        _ => {}
                    }
                    region.remarks.push(Remark { ns, refused_at: None, text: happened(event) });
                }
            }
            _ => {}
        }
    }

    /// A request of the backend channel, or GET_SHMEM_CONFIG, which has no such fields.
    fn request(&mut self, device: &'a str, message: &Message, ns: u64) {
        let number = |name| message.fields.number(name);
        let (Some(shmid), Some(start), Some(len)) = (number("shmid"), number("shm_offset"), number("len"))
        else {
            return;
        };
        let region = self.0.entry((device, shmid)).or_default();
        let end = start.saturating_add(len);
        if message.result != Outcome::Done {
            let text = format!("{}: {}", request(message), result(message));
            region.remarks.push(Remark { ns, refused_at: Some(start), text });
            return;
        }
        // A mapping of a back-end that came back takes the place of the old one.
        region.end_at(ns, start, end);
        if message.name.ends_with("SHMEM_MAP") && start < end {
            let mapping = Mapping {
                start,
                end,
                file_offset: number("fd_offset").unwrap_or(0),
                is_writable: number("flags").unwrap_or(0) & READ_WRITE != 0,
                from_ns: ns,
                to_ns: u64::MAX,
            };
            region.living.insert(start, mapping);
        }
    }
}

/// From the first record to the last.
#[derive(Clone, Copy)]
struct Times {
    first: u64,
    last: u64,
}

impl Times {
    fn x(self, ns: u64) -> u32 {
        let past = u128::from(ns.clamp(self.first, self.last) - self.first);
        let all = u128::from(self.last - self.first).max(1);
        LEFT + (past * u128::from(RIGHT - LEFT) / all) as u32
    }
}

/// A stretch of offsets, and where it is drawn.
struct Stretch {
    start: u64,
    end: u64,
    top: u32,
    bottom: u32,
}

struct Chart {
    canvas: Canvas,
    y: u32,
    times: Times,
    rows: Vec<Stretch>,
}

impl Chart {
    fn region(&mut self, region: &Region) {
        if region.mappings().next().is_none() {
            self.canvas.text("soft", Anchor::Start, LEFT, self.y + LINE, "nothing was mapped");
            self.y += 2 * LINE;
        } else {
            self.stretches(region);
            self.mappings(region);
            self.axis();
        }
        self.remarks(&region.remarks);
    }

    /// Divides the offsets at the ends of mappings, and names them.
    fn stretches(&mut self, region: &Region) {
        let mappings = region.mappings();
        let ends: BTreeSet<u64> = mappings.clone().flat_map(|mapping| [mapping.start, mapping.end]).collect();
        let ends: Vec<u64> = ends.into_iter().take(MOST_STRETCHES + 1).collect();
        let longest = ends.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(1);
        for pair in ends.windows(2) {
            let (start, end) = (pair[0], pair[1]);
            let is_used = mappings.clone().any(|mapping| mapping.start <= start && end <= mapping.end);
            let to_scale = u128::from(end - start) * u128::from(HIGHEST) / u128::from(longest);
            let height = if is_used { LOWEST.max(to_scale as u32) } else { LOWEST };
            self.rows.push(Stretch { start, end, top: self.y, bottom: self.y + height });
            self.offset(start);
            self.y += height;
        }
        self.offset(ends[ends.len() - 1]);
    }

    /// Names the offset that is drawn here.
    fn offset(&mut self, offset: u64) {
        self.canvas.line("guide", [LEFT - 4, self.y, RIGHT, self.y]);
        self.canvas.text("soft", Anchor::End, LEFT - 8, self.y + 4, &format!("+{offset:#x}"));
    }

    /// Where an offset is, or the nearest that is drawn.
    fn y_of(&self, offset: u64) -> u32 {
        let row = self.rows.iter().find(|row| offset < row.end).or(self.rows.last());
        row.map_or(self.y, |row| {
            let (past, len) = (offset.clamp(row.start, row.end) - row.start, row.end - row.start);
            row.top + (u128::from(past) * u128::from(row.bottom - row.top) / u128::from(len)) as u32
        })
    }

    fn mappings(&mut self, region: &Region) {
        let drawn_to = self.rows.last().map_or(0, |row| row.end);
        let mut ticks = BTreeSet::new();
        let mut left_out = 0;
        for mapping in region.mappings() {
            if mapping.end > drawn_to {
                left_out += 1;
                continue;
            }
            let [top, bottom] = [mapping.start, mapping.end].map(|offset| self.y_of(offset));
            let [left, right] = [mapping.from_ns, mapping.to_ns].map(|ns| self.times.x(ns));
            if right - left < 3 {
                // Many that live for a moment, at the same place, are one line.
                ticks.insert((left, top, bottom));
                continue;
            }
            let (class, word) = if mapping.is_writable { ("rw", "rw") } else { ("ro", "r") };
            self.canvas.rect(class, None, [left, top, right - left, bottom - top]);
            let columns = columns_in((right - left).saturating_sub(8));
            let words = [format!("{word}, file +{:#x}", mapping.file_offset), word.to_owned()];
            if let Some(text) = words.iter().find(|text| text.len() <= columns) {
                self.canvas.text("ink", Anchor::Start, left + 4, top + 13, text);
            }
        }
        for (x, top, bottom) in ticks {
            self.canvas.line("good", [x, top, x, bottom]);
        }
        for remark in &region.remarks {
            let x = self.times.x(remark.ns);
            if let Some(offset) = remark.refused_at {
                let y = self.y_of(offset);
                self.canvas.path("wrong", &format!("M{} {}l8 8m0 -8l-8 8", x - 4, y.saturating_sub(4)));
            } else if let (Some(first), Some(last)) = (self.rows.first(), self.rows.last()) {
                self.canvas.line("edge dashed", [x, first.top, x, last.bottom]);
            }
        }
        if left_out > 0 {
            self.y += LINE;
            let text = format!("{left_out} mappings that reach beyond +{drawn_to:#x} are left out");
            self.canvas.text("soft", Anchor::Start, LEFT, self.y, &text);
        }
    }

    /// Times below the chart.
    fn axis(&mut self) {
        self.y += LINE + 4;
        let Times { first, last } = self.times;
        for quarter in 0..=4 {
            let ns = first + (last - first) / 4 * quarter;
            let anchor = match quarter {
                0 => Anchor::Start,
                4 => Anchor::End,
                _ => Anchor::Middle,
            };
            let x = LEFT + (RIGHT - LEFT) / 4 * quarter as u32;
            let time = if quarter == 0 { format!("{} s", seconds(ns)) } else { seconds(ns) };
            self.canvas.text("soft", anchor, x, self.y, &time);
        }
        self.y += LINE;
    }

    /// Refusals and events, in words.
    fn remarks(&mut self, remarks: &[Remark]) {
        self.y += LINE / 2;
        for remark in remarks.iter().take(MOST_REMARKS) {
            let (class, mark) = if remark.refused_at.is_some() { ("bad", "×") } else { ("ink", "¦") };
            let text = format!("{mark} {} {}", seconds(remark.ns), remark.text);
            for line in wrap(&text, columns_in(WIDTH - 2 * MARGIN)) {
                self.y += LINE;
                self.canvas.text(class, Anchor::Start, MARGIN, self.y, &line);
            }
        }
        if let Some(more) = remarks.len().checked_sub(MOST_REMARKS).filter(|&more| more > 0) {
            self.y += LINE;
            self.canvas.text("soft", Anchor::Start, MARGIN, self.y, &format!("and {more} more"));
        }
    }
}
