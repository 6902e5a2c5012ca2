//! A trace as a sequence diagram in SVG (`hotslot trace FILE --sequence svg`): the guest, hotslot, and the
//! back-end of each device, with time from top to bottom.
//!
//! Each request, each answer and each event has a row with its time, its arrow and, beside the life lines,
//! its text. So no two texts can meet, however many devices there are.

use super::record::{Direction, Event, Message, Noise, Outcome, ReadOrWrite, Record, What};
use super::text::{happened, register, request, result, seconds};
use crate::picture::canvas::{Anchor, Canvas, LINE, MARGIN, WIDTH, columns_in, fit, wrap};

/// How many records are drawn. The picture is then some 20,000 pixels high.
const MOST: usize = 600;
/// How many lines a text may have.
const MOST_LINES: usize = 4;

/// The right end of the times.
const TIMES: u32 = MARGIN + 96;
const GUEST: u32 = TIMES + 36;
const HOTSLOT: u32 = GUEST + 60;
/// From hotslot to the first back-end, and from each back-end to the next where there are few.
const SPACING: u32 = 60;
/// What they get together where there are more, and the least for one.
const ROOM: u32 = 120;
const LEAST_SPACING: u32 = 18;
/// How many back-ends have a life line of their own; a machine has no more. Further ones share the last.
const MOST_BACKENDS: usize = 19;

/// Draws all of it.
pub fn draw(records: &[Record]) -> String {
    let (shown, rest) = records.split_at(records.len().min(MOST));
    let mut rows: Vec<Row> = shown.iter().flat_map(rows).collect();
    // Stable: a request before its answer, and before what it caused.
    rows.sort_by_key(|row| row.time_ns);
    let mut devices = Vec::new();
    for device in shown.iter().filter_map(|record| record.device.as_deref()) {
        if !devices.contains(&device) {
            devices.push(device);
        }
    }
    let mut diagram = Diagram::new(&devices);
    let mut before = None;
    for row in &rows {
        diagram.row(row, before);
        before = Some(row.record);
    }
    diagram.finish(rest)
}

/// A life line; a back-end's by its device.
#[derive(Clone, Copy)]
enum Line<'a> {
    Guest,
    Hotslot,
    Backend(&'a str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Request,
    Answer,
    /// An answer that says no, or bytes that are none.
    Wrong,
}

struct Row<'a> {
    record: &'a Record,
    time_ns: u64,
    /// An arrow; both ends are one for an event.
    from: Line<'a>,
    to: Line<'a>,
    mark: Mark,
    text: String,
}

/// The rows of a record, each with its time.
fn rows(record: &Record) -> Vec<Row<'_>> {
    let &Record { time_ns, took_ns, ref device, ref what, .. } = record;
    let device = device.as_deref();
    let backend = device.map_or(Line::Hotslot, Line::Backend);
    let row = |from, to, mark, text| Row { record, time_ns, from, to, mark, text };
    match what {
        What::Trace { .. } => Vec::new(),
        What::Message(message) => {
            let (from, to) = match message.direction {
                Direction::ToBackend => (Line::Hotslot, backend),
                Direction::FromBackend => (backend, Line::Hotslot),
            };
            let mut rows = vec![row(from, to, Mark::Request, request(message))];
            if let Some((mark, text)) = answer(message) {
                rows.push(Row { time_ns: time_ns.saturating_add(took_ns), ..row(to, from, mark, text) });
            }
            rows
        }
        What::Noise(Noise { bytes, reason, .. }) => {
            vec![row(backend, Line::Hotslot, Mark::Wrong, format!("no message ({bytes}): {reason}"))]
        }
        What::Register(access) => {
            let text = format!("{}: {}", device.unwrap_or("?"), register(access));
            let mark = if access.reason.is_some() { Mark::Wrong } else { Mark::Request };
            vec![match access.access {
                ReadOrWrite::Write => row(Line::Guest, Line::Hotslot, mark, text),
                ReadOrWrite::Read => row(Line::Hotslot, Line::Guest, Mark::Answer, text),
            }]
        }
        What::Event(event @ Event { reason, .. }) => {
            let mark = if reason.is_some() { Mark::Wrong } else { Mark::Request };
            vec![row(backend, backend, mark, happened(event))]
        }
        What::LeftOut { count } => {
            let text = format!("{count} records are missing: the disk was late");
            vec![row(Line::Hotslot, Line::Hotslot, Mark::Wrong, text)]
        }
    }
}

/// What came of a request; `None` where it was not answered and need not be.
fn answer(message: &Message) -> Option<(Mark, String)> {
    match message.result {
        Outcome::Done if message.answer.is_none() => None,
        Outcome::Done => Some((Mark::Answer, format!("= {}", result(message)))),
        Outcome::Refused => Some((Mark::Wrong, format!("refused: {}", result(message)))),
        Outcome::Failed => Some((Mark::Wrong, format!("failed: {}", result(message)))),
    }
}

struct Diagram<'a> {
    canvas: Canvas,
    devices: &'a [&'a str],
    spacing: u32,
    /// Where the life lines start, and where the next row does.
    top: u32,
    y: u32,
}

impl<'a> Diagram<'a> {
    fn new(devices: &'a [&'a str]) -> Diagram<'a> {
        let further = (devices.len().min(MOST_BACKENDS) as u32).saturating_sub(1);
        let spacing = ROOM.checked_div(further).unwrap_or(SPACING).clamp(LEAST_SPACING, SPACING);
        let mut canvas = Canvas::new("What passed between the guest, hotslot and the back-ends");
        let mut y = MARGIN + 2 * LINE;
        for (number, device) in (1..).zip(devices) {
            y += LINE;
            let number = MOST_BACKENDS.min(number);
            let key = fit(&format!("{number}: the back-end of {device}"), columns_in(WIDTH - 2 * MARGIN));
            canvas.text("soft", Anchor::Start, MARGIN, y, &key);
        }
        y += 2 * LINE;
        let mut diagram = Diagram { canvas, devices, spacing, top: y + 6, y: y + 2 * LINE };
        diagram.canvas.text("soft", Anchor::End, TIMES, y, "seconds");
        diagram.canvas.text("title", Anchor::Middle, GUEST, y, "guest");
        diagram.canvas.text("title", Anchor::Middle, HOTSLOT, y, "hotslot");
        for (number, device) in (1..=MOST_BACKENDS).zip(devices) {
            let x = diagram.x(Line::Backend(device));
            diagram.canvas.text("title", Anchor::Middle, x, y, &format!("{number}"));
        }
        diagram
    }

    fn x(&self, line: Line) -> u32 {
        match line {
            Line::Guest => GUEST,
            Line::Hotslot => HOTSLOT,
            Line::Backend(device) => {
                let number = self.devices.iter().position(|other| *other == device).unwrap_or(0);
                HOTSLOT + SPACING + number.min(MOST_BACKENDS - 1) as u32 * self.spacing
            }
        }
    }

    /// Where the texts start.
    fn texts(&self) -> u32 {
        let further = (self.devices.len().min(MOST_BACKENDS) as u32).saturating_sub(1);
        HOTSLOT + SPACING + further * self.spacing + 16
    }

    /// Draws a row below that of the record `before`. An answer that is not below its request names it.
    fn row(&mut self, row: &Row, before: Option<&Record>) {
        let is_answer = row.time_ns > row.record.time_ns;
        let is_below = before.is_some_and(|before| std::ptr::eq(before, row.record));
        let name = match &row.record.what {
            What::Message(message) if is_answer && !is_below => format!("{} ", message.name),
            _ => String::new(),
        };
        let (x, y) = (self.texts(), self.y);
        let most = columns_in(WIDTH - MARGIN - x);
        let mut lines = wrap(&format!("{name}{}", row.text), most);
        if lines.len() > MOST_LINES {
            lines.truncate(MOST_LINES);
            lines[MOST_LINES - 1] = fit(&format!("{} …", lines[MOST_LINES - 1]), most);
        }
        let class = if row.mark == Mark::Wrong { "bad" } else { "ink" };
        for (number, line) in (0..).zip(&lines) {
            self.canvas.text(class, Anchor::Start, x, y + number * LINE, line);
        }
        let time = seconds(row.time_ns);
        self.canvas.text("soft", Anchor::End, TIMES, y, &fit(&time, columns_in(TIMES)));
        self.arrow(row, y - 4);
        self.y += lines.len() as u32 * LINE + 4;
    }

    /// The arrow of a row. One that says no ends in a cross.
    fn arrow(&mut self, row: &Row, y: u32) {
        let (from, to) = (self.x(row.from), self.x(row.to));
        let class = match row.mark {
            Mark::Request => "edge",
            Mark::Answer => "edge dashed",
            Mark::Wrong => "wrong",
        };
        if from == to {
            self.canvas.path(class, &format!("M{} {y}l5 -5l5 5l-5 5z", from - 5));
        } else {
            self.canvas.line(class, [from, y, to, y]);
            let back = if from < to { -7 } else { 7 };
            let class = if row.mark == Mark::Wrong { "wrong" } else { "edge" };
            self.canvas.path(class, &format!("M{to} {y}l{back} -4m0 8L{to} {y}"));
        }
        if row.mark == Mark::Wrong {
            let middle = (from + to) / 2;
            self.canvas.path("wrong", &format!("M{} {}l10 10m0 -10l-10 10", middle - 5, y - 5));
        }
    }

    fn finish(mut self, rest: &[Record]) -> String {
        let bottom = self.y;
        let backends = self.devices.iter().take(MOST_BACKENDS).map(|device| self.x(Line::Backend(device)));
        for x in [GUEST, HOTSLOT].into_iter().chain(backends.collect::<Vec<_>>()) {
            self.canvas.line("guide", [x, self.top, x, bottom]);
        }
        let mut notes = vec![
            "A dashed arrow is an answer or what a register reads; a diamond an event; a cross \
                              something refused or wrong."
                .to_owned(),
        ];
        if let Some(first) = rest.first() {
            let (count, from) = (rest.len(), seconds(first.time_ns));
            notes.push(format!("{count} more records are left out: --from {from} shows the next ones."));
        }
        self.y += LINE;
        for line in notes.iter().flat_map(|note| wrap(note, columns_in(WIDTH - 2 * MARGIN))) {
            self.canvas.text("soft", Anchor::Start, MARGIN, self.y, &line);
            self.y += LINE;
        }
        self.canvas.finish(self.y)
    }
}
