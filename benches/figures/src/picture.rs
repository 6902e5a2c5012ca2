//! The figures as a picture (SVG): a small chart for each, two side by side.
//!
//! A bar is as long as the median, the line across its end goes from the minimum to the 99th percentile. Each
//! chart has a scale of its own that begins at 0.

use hotslot::picture::canvas::{Anchor, Canvas, LINE, MARGIN, WIDTH, columns_in, fit, wrap};

use crate::figures::{Figure, Run, Sample};
use crate::table::{Scale, ratio_text, ratios};

/// The width of a chart.
const CHART: u32 = (WIDTH - 3 * MARGIN) / 2;
/// Where bars begin in a chart, and how long the longest may be.
const BARS: u32 = 112;
const LONGEST: u32 = 136;
/// The height of a bar.
const BAR: u32 = 10;

const LEGEND: &str = "A bar is the median, its line goes from the minimum to the 99th percentile; each chart has its own \
                      scale, from 0. Behind the number: its ratio to the one with the plain bar.";

/// Draws those figures that the catalog has in the picture.
pub fn draw(run: &Run) -> String {
    let mut canvas = Canvas::new("hotslot, measured");
    let mut y = MARGIN + 3 * LINE;
    for line in run.remarks.iter().chain([&LEGEND.to_owned()]) {
        for line in wrap(line, columns_in(WIDTH - 2 * MARGIN)) {
            canvas.text("soft", Anchor::Start, MARGIN, y, &line);
            y += LINE;
        }
    }
    let charts: Vec<&Figure> = run.figures.iter().filter(|figure| figure.entry.is_in_picture).collect();
    for pair in charts.chunks(2) {
        y += LINE;
        let ends = (0..)
            .zip(pair)
            .map(|(column, figure)| chart(&mut canvas, MARGIN + column * (CHART + MARGIN), y, figure));
        y = ends.max().unwrap_or(y);
    }
    canvas.finish(y)
}

/// Draws one chart from its title's base line on, and says where it ends.
fn chart(canvas: &mut Canvas, left: u32, mut y: u32, figure: &Figure) -> u32 {
    let scale = Scale::of(figure);
    let title = format!("{}{}", figure.entry.title, scale.name);
    canvas.text("title", Anchor::Start, left, y, &fit(&title, columns_in(CHART)));
    let longest = figure.samples.iter().map(|sample| sample.median).fold(0.0, f64::max);
    let x = |number: f64| {
        let share = if longest > 0.0 { number / longest } else { 0.0 };
        left + BARS + (share * f64::from(LONGEST)).min(f64::from(LONGEST)) as u32
    };
    for sample in &figure.samples {
        y += LINE;
        let is_reference = figure.reference() == Some(sample);
        canvas.text("ink", Anchor::Start, left, y, &fit(&sample.subject, columns_in(BARS - 8)));
        let class = if is_reference { "fixed" } else { bar_class(sample) };
        let end = x(sample.median);
        canvas.rect(class, None, [left + BARS, y - BAR + 1, (end - left - BARS).max(1), BAR]);
        let middle = y - BAR / 2 + 1;
        canvas.line("edge", [x(sample.min), middle, x(sample.p99), middle]);
        let ratio = ratios(figure, sample)[0].filter(|_| !is_reference);
        let ratio = ratio.map_or(String::new(), |ratio| format!(" {}x", ratio_text(ratio)));
        let text = format!("{}{ratio}", scale.text(sample.median));
        let room = columns_in(CHART - BARS - LONGEST - 8);
        canvas.text("ink", Anchor::End, left + CHART, y, &fit(&text, room));
    }
    y + LINE
}

fn bar_class(sample: &Sample) -> &'static str {
    if sample.subject.starts_with("hotslot") { "ram" } else { "window" }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hotslot_test_support::picture;

    use crate::figures::parse;

    #[test]
    fn nothing_overlaps_and_each_subject_has_a_bar() {
        let mut text = "# 27 November 2026, a machine with a name that is so long that it takes more than one line of the \
                        picture, where a line has room for about a hundred columns\n"
            .to_owned();
        for name in ["boot-vmlinux", "map-same-4k", "stripped", "crates", "neighbour"] {
            for (subject, median) in [("hotslot", 1.5), ("bare", 1.0), ("a-subject-with-a-long-name", 1e9)] {
                text += &format!("{name}@{subject} 0 {median} 2e9 3e9\n");
            }
        }
        text += "micro-channel@nothing 0 0 0 0\nnot-known@hotslot 1 1 1 1\n";
        let svg = super::draw(&parse(&text).unwrap());
        let texts = picture::texts(&svg);
        assert!(texts.iter().any(|text| text == "1.5 1.500x"), "{texts:?}");
        assert!(!texts.iter().any(|text| text.contains("not-known")));
        assert_eq!(picture::boxes(&svg, "fixed").len(), 5);
        assert_eq!(picture::boxes(&svg, "ram").len(), 5);
    }
}
