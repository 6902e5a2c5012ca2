//! The picture of guest physical memory: one column, the lowest address at the top.
//!
//! Boxes are to scale, but none is lower than its text, and a long stretch with nothing in it is cut short,
//! which a double wave shows. What is in a box (the mappings of a window) has a scale of its own. As each
//! text is beside the top of its box, no two texts can meet.

use super::canvas::{Anchor, Canvas, LINE, MARGIN, WIDTH, columns_in, fit, wrap};
use crate::memory::{Access, GuestRange};
use crate::size;

/// A part of guest physical memory.
pub struct Part {
    /// Where it is.
    pub range: GuestRange,
    /// What it is.
    pub kind: Kind,
    /// What it is called.
    pub name: String,
    /// What else there is to say.
    pub notes: Vec<String>,
    /// The parts of it.
    pub inside: Vec<Part>,
}

impl Part {
    /// A part of which there is no more to say.
    pub fn new(range: GuestRange, kind: Kind, name: impl Into<String>) -> Part {
        Part { range, kind, name: name.into(), notes: Vec::new(), inside: Vec::new() }
    }

    /// The name and what else there is to say.
    pub fn text(&self) -> String {
        [std::slice::from_ref(&self.name), &self.notes].concat().join(", ")
    }
}

/// What a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RAM.
    Ram,
    /// Something that is put into RAM before the guest runs.
    Boot,
    /// The registers of a virtio device.
    Registers,
    /// Pages that each machine has, outside RAM.
    Fixed,
    /// A shared memory region.
    Window,
    /// A live mapping in one.
    Mapping(Access),
}

impl Kind {
    /// The class of its box.
    fn class(self) -> &'static str {
        match self {
            Kind::Ram => "ram",
            Kind::Boot => "boot",
            Kind::Registers => "registers",
            Kind::Fixed => "fixed",
            Kind::Window => "window",
            Kind::Mapping(Access::ReadOnly) => "ro",
            Kind::Mapping(Access::ReadWrite) => "rw",
        }
    }

    /// The word in its box.
    fn word(self) -> &'static str {
        match self {
            Kind::Ram => "RAM",
            Kind::Boot => "",
            Kind::Registers => "registers",
            Kind::Fixed => "fixed",
            Kind::Window => "window",
            Kind::Mapping(Access::ReadOnly) => "r",
            Kind::Mapping(Access::ReadWrite) => "rw",
        }
    }

    /// What is between the parts of such a box.
    fn between(self) -> &'static str {
        if self == Kind::Window { "hole" } else { "" }
    }
}

/// The addresses end where the boxes start.
const BOX: u32 = 150;
const BOX_WIDTH: u32 = 150;
/// How much narrower a box in a box is.
const INSET: u32 = 20;
const TEXT: u32 = BOX + BOX_WIDTH + 14;

/// The lowest box has a line of text.
const LOWEST: u32 = LINE + 4;
/// The largest box in the whole, and in a box, is at most so high, and more than half of it.
const HIGHEST: u64 = 160;
const HIGHEST_INSIDE: u64 = 40;
/// Stretches with nothing in them are cut when they would be higher, and then as high as the second number.
const CUT_BEYOND: u64 = 48;
const CUT: u32 = 34;

/// How many parts of one box are shown, and how many of all windows together.
const MOST_INSIDE: usize = 24;
const MOST_INSIDE_ALL: usize = 240;

/// Draws the parts. `windows_from`: where windows will begin that are not known yet.
pub fn draw(title: &str, mut parts: Vec<Part>, windows_from: Option<u64>) -> String {
    parts.sort_by_key(|part| part.range.start());
    let filled = parts.iter().filter(|part| !part.inside.is_empty()).count();
    let mut column = Column {
        canvas: Canvas::new(title),
        y: MARGIN + 2 * LINE,
        most_inside: (MOST_INSIDE_ALL / filled.max(1)).clamp(2, MOST_INSIDE),
    };
    let scale = Scale::of(&parts, HIGHEST);
    let mut at = 0;
    for part in &parts {
        column.gap(at, part.range.start(), 0, scale, "nothing");
        column.part(part, 0, scale, part.name.clone());
        at = end(&part.range);
    }
    match windows_from {
        Some(start) => {
            column.gap(at, start, 0, scale, "nothing");
            column.windows_to_come(start);
        }
        None => column.address(at),
    }
    column.legend(scale)
}

/// How many bytes a pixel stands for.
#[derive(Clone, Copy)]
struct Scale(u64);

impl Scale {
    /// With which the largest part is at most so high.
    fn of(parts: &[Part], highest: u64) -> Scale {
        let largest = parts.iter().map(|part| part.range.len()).max().unwrap_or(1);
        Scale(largest.div_ceil(highest).checked_next_power_of_two().unwrap_or(1 << 63))
    }

    fn pixels(self, len: u64) -> u64 {
        len / self.0
    }
}

/// The first address after it.
fn end(range: &GuestRange) -> u64 {
    range.last().saturating_add(1)
}

struct Column {
    canvas: Canvas,
    /// Where the next row starts.
    y: u32,
    most_inside: usize,
}

impl Column {
    /// The address of the row that starts here.
    fn address(&mut self, at: u64) {
        self.canvas.line("guide", [BOX - 6, self.y, BOX, self.y]);
        self.canvas.text("soft", Anchor::End, BOX - 8, self.y + 5, &format!("{at:#014x}"));
    }

    /// Lines of text beside the row that starts here.
    fn label(&mut self, class: &str, lines: &[String]) {
        for (number, line) in (0..).zip(lines) {
            self.canvas.text(class, Anchor::Start, TEXT, self.y + 14 + number * LINE, line);
        }
    }

    fn part(&mut self, part: &Part, depth: u32, scale: Scale, name: String) {
        let mut pieces = vec![name, size::text(part.range.len())];
        pieces.extend(part.notes.iter().cloned());
        let inner = Scale::of(&part.inside, HIGHEST_INSIDE);
        if !part.inside.is_empty() {
            pieces.push(format!("in here a pixel is {}", size::text(inner.0)));
        }
        let lines = wrap(&pieces.join(", "), columns_in(WIDTH - MARGIN - TEXT));
        let to_scale = scale.pixels(part.range.len());
        let (top, behind) = (self.y, self.canvas.place());
        let (left, width) = (BOX + depth * INSET, BOX_WIDTH - depth * INSET);
        self.address(part.range.start());
        self.label("ink", &lines);
        self.canvas.line("guide", [BOX + BOX_WIDTH, top + 10, TEXT - 4, top + 10]);
        self.canvas.text("ink", Anchor::Middle, left + width / 2, top + 14, part.kind.word());
        self.y += LOWEST + (lines.len() as u32 - 1) * LINE;
        if !part.inside.is_empty() {
            self.inside(part, depth + 1, inner);
        }
        let lowest = u64::from(self.y - top);
        self.y = top + lowest.max(to_scale) as u32;
        let dashed = if lowest > to_scale { " dashed" } else { "" };
        let class = format!("{}{dashed}", part.kind.class());
        self.canvas.rect(&class, Some(behind), [left, top, width, self.y - top]);
    }

    /// The parts of a part, and what is between them.
    fn inside(&mut self, part: &Part, depth: u32, scale: Scale) {
        let mut inside: Vec<&Part> = part.inside.iter().collect();
        inside.sort_by_key(|part| part.range.start());
        let (shown, rest) = inside.split_at(inside.len().min(self.most_inside));
        let mut at = part.range.start();
        for inner in shown {
            self.gap(at, inner.range.start(), depth, scale, part.kind.between());
            let name = match part.kind {
                Kind::Window => {
                    format!("{} at +{:#x}", inner.name, inner.range.start() - part.range.start())
                }
                _ => inner.name.clone(),
            };
            self.part(inner, depth, scale, name);
            at = end(&inner.range);
        }
        if let [first, .., last] | [first @ last] = rest {
            self.gap(at, first.range.start(), depth, scale, part.kind.between());
            self.address(first.range.start());
            self.label("ink", &[format!("and {} more", rest.len())]);
            let (left, width) = (BOX + depth * INSET, BOX_WIDTH - depth * INSET);
            self.canvas.rect("rest dashed", None, [left, self.y, width, CUT]);
            self.waves(left, width);
            self.y += CUT;
            at = end(&last.range);
        }
        self.gap(at, end(&part.range), depth, scale, part.kind.between());
        self.y += LINE / 3;
    }

    /// A stretch with nothing in it.
    fn gap(&mut self, from: u64, to: u64, depth: u32, scale: Scale, name: &str) {
        let Some(len) = to.checked_sub(from).filter(|&len| len > 0) else { return };
        let (left, width) = (BOX + depth * INSET, BOX_WIDTH - depth * INSET);
        self.address(from);
        if !name.is_empty() {
            self.label("soft", &[format!("{name}, {}", size::text(len))]);
        }
        let to_scale = scale.pixels(len);
        let is_cut = to_scale > CUT_BEYOND;
        let height = if is_cut { CUT } else { LOWEST.max(to_scale as u32) };
        if depth == 0 {
            for x in [left, left + width] {
                self.canvas.line("guide dashed", [x, self.y, x, self.y + height]);
            }
        }
        if is_cut {
            self.waves(left, width);
        }
        self.y += height;
    }

    /// Where the windows of back-ends begin that are not known yet.
    fn windows_to_come(&mut self, start: u64) {
        self.address(start);
        let lines = ["windows of shared memory regions,", "as many and as large as the back-ends say"];
        self.label("ink", &lines.map(str::to_owned));
        self.canvas.rect("window dashed", None, [BOX, self.y, BOX_WIDTH, 3 * LINE]);
        self.canvas.text("ink", Anchor::Middle, BOX + BOX_WIDTH / 2, self.y + 14, Kind::Window.word());
        self.y += LINE;
        self.waves(BOX, BOX_WIDTH);
        self.y += 2 * LINE;
    }

    /// Two waves through the row that starts here.
    fn waves(&mut self, left: u32, width: u32) {
        let quarter = width / 4;
        for y in [self.y + CUT / 2 - 3, self.y + CUT / 2 + 3] {
            let first = format!("M{left} {y}q{} -8 {quarter} 0", quarter / 2);
            self.canvas.path("edge", &format!("{first}{}", format!("t{quarter} 0").repeat(3)));
        }
    }

    fn legend(mut self, scale: Scale) -> String {
        self.y += 2 * LINE;
        for line in [
            format!(
                "To scale: a pixel is {}. A box with a dashed edge is drawn larger than",
                size::text(scale.0)
            ),
            "that; a double wave cuts a longer stretch short.".to_owned(),
        ] {
            let line = fit(&line, columns_in(WIDTH - 2 * MARGIN));
            self.canvas.text("soft", Anchor::Start, MARGIN, self.y, &line);
            self.y += LINE;
        }
        self.canvas.finish(self.y)
    }
}
