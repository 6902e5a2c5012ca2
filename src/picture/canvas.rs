//! What a picture is drawn on: boxes, lines and texts with whole coordinates, and the colours. Used by each
//! picture.

use svg::Document;
use svg::node::Text;
use svg::node::element::Element;

/// The width of a picture, in pixels as all coordinates.
pub const WIDTH: u32 = 800;
/// Free space around it.
pub const MARGIN: u32 = 16;
/// From one line of text to the next.
pub const LINE: u32 = 15;
/// The width that a character of [`FONT_SIZE`] may take. Those of monospace fonts take 0.60 of their size.
const COLUMN: f32 = 7.4;
const FONT_SIZE: u32 = 12;

/// Colours: the same classes in light and in dark. A program that knows no media queries shows the first.
const STYLE: &str = "
.paper{fill:#ffffff}
.ink{fill:#1f2328}.soft{fill:#59636e}.bad{fill:#b3261e}.title{fill:#1f2328;font-weight:bold}
.edge{stroke:#59636e;fill:none}.guide{stroke:#9aa4ae;fill:none}
.ram{fill:#cfe3fb;stroke:#3a6ea5}.boot{fill:#f2f7fe;stroke:#3a6ea5}
.registers{fill:#fbe2c0;stroke:#a3681a}.fixed{fill:#ececec;stroke:#6e7781}
.window{fill:#e9e2fa;stroke:#6f56b8}.rest{fill:#ffffff;stroke:#6f56b8}
.rw{fill:#bfe8c8;stroke:#2f7d46}.ro{fill:#f6f3c4;stroke:#85791f}
.good{stroke:#2f7d46;fill:none}.wrong{stroke:#b3261e;fill:none}.refused{fill:#fbdcd9;stroke:#b3261e}
.dashed{stroke-dasharray:4 3}
@media (prefers-color-scheme:dark){
.paper{fill:#0d1117}
.ink{fill:#e6edf3}.soft{fill:#9aa4ae}.bad{fill:#ff8f86}.title{fill:#e6edf3}
.edge{stroke:#9aa4ae}.guide{stroke:#59636e}
.ram{fill:#17365c;stroke:#79b0ee}.boot{fill:#102540;stroke:#79b0ee}
.registers{fill:#4d3310;stroke:#e0a551}.fixed{fill:#2a3038;stroke:#9aa4ae}
.window{fill:#2e2452;stroke:#a993ea}.rest{fill:#0d1117;stroke:#a993ea}
.rw{fill:#174a26;stroke:#6fcf88}.ro{fill:#47420f;stroke:#d6c94f}
.good{stroke:#6fcf88}.wrong{stroke:#ff8f86}.refused{fill:#5a1a16;stroke:#ff8f86}
}";

/// Where a text's x coordinate is.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// The text begins there.
    Start,
    /// It has its middle there.
    Middle,
    /// It ends there.
    End,
}

/// The elements of a picture so far; the later ones cover the earlier ones.
pub struct Canvas(Vec<Element>);

impl Canvas {
    /// A canvas with a title in its first line.
    pub fn new(title: &str) -> Canvas {
        let mut canvas = Canvas(Vec::new());
        canvas.text("title", Anchor::Start, MARGIN, MARGIN + FONT_SIZE, title);
        canvas
    }

    /// Where an element can be put later, behind all that follow.
    pub fn place(&self) -> usize {
        self.0.len()
    }

    /// A box: left, top, width and height. `at` is a [`Self::place`], or `None` for in front of all.
    pub fn rect(&mut self, class: &str, at: Option<usize>, [x, y, width, height]: [u32; 4]) {
        let rect = element("rect", class).with("x", x).with("y", y);
        self.0.insert(at.unwrap_or(self.0.len()), rect.with("width", width).with("height", height).0);
    }

    /// A line from a point to another.
    pub fn line(&mut self, class: &str, [x1, y1, x2, y2]: [u32; 4]) {
        let line = element("line", class).with("x1", x1).with("y1", y1);
        self.0.push(line.with("x2", x2).with("y2", y2).0);
    }

    /// A path, in the language of SVG's attribute `d`.
    pub fn path(&mut self, class: &str, d: &str) {
        self.0.push(element("path", class).with("d", d).0);
    }

    /// A line of text with its base line at `y`.
    pub fn text(&mut self, class: &str, anchor: Anchor, x: u32, y: u32, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let mut text_element = element("text", class).with("x", x).with("y", y).with("text-anchor", anchor).0;
        svg::Node::append(&mut text_element, Text::new(visible(text)));
        self.0.push(text_element);
    }

    /// The picture, as the text of an SVG file.
    pub fn finish(self, height: u32) -> String {
        let document = Document::new()
            .set("viewBox", format!("0 0 {WIDTH} {height}"))
            .set("width", WIDTH)
            .set("height", height)
            .set("font-family", "ui-monospace, monospace")
            .set("font-size", FONT_SIZE);
        let mut style = Element::new("style");
        svg::Node::append(&mut style, Text::new(STYLE));
        let paper = element("rect", "paper").with("width", WIDTH).with("height", height).0;
        let document = document.add(style).add(paper);
        format!("{}\n", self.0.into_iter().fold(document, Document::add))
    }
}

/// An element, with attributes one after the other.
struct Attributed(Element);

fn element(name: &str, class: &str) -> Attributed {
    Attributed(Element::new(name)).with("class", class)
}

impl Attributed {
    fn with(mut self, name: &str, value: impl Into<svg::node::Value>) -> Attributed {
        svg::Node::assign(&mut self.0, name, value);
        self
    }
}

/// How many columns a text takes. A character that is not ASCII may take two.
fn columns(text: &str) -> usize {
    text.chars().map(|character| if character.is_ascii() { 1 } else { 2 }).sum()
}

/// How many columns a width has room for.
pub fn columns_in(width: u32) -> usize {
    (width as f32 / COLUMN) as usize
}

/// A text with at most so many columns: its end is cut off where it has more.
pub fn fit(text: &str, most: usize) -> String {
    if columns(text) <= most {
        return text.to_owned();
    }
    let mut left = most.saturating_sub(2);
    let fits = |character: &char| {
        let wide = if character.is_ascii() { 1 } else { 2 };
        left.checked_sub(wide).inspect(|&rest| left = rest).is_some()
    };
    text.chars().take_while(fits).chain(['…']).collect()
}

/// Breaks a text into lines of at most so many columns, behind spaces and opening parentheses. At least one
/// line.
pub fn wrap(text: &str, most: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_inclusive([' ', '(']) {
        match lines.last_mut() {
            Some(line) if columns(line) + columns(word.trim_end()) <= most => line.push_str(word),
            _ => lines.push(fit(word, most)),
        }
    }
    if lines.len() > 1 {
        lines.retain(|line| !line.is_empty());
    }
    lines
}

/// XML has no control characters, and neither of these two.
fn visible(text: &str) -> String {
    let is_visible = |&character: &char| !character.is_control() && !"\u{fffe}\u{ffff}".contains(character);
    text.chars().map(|character| Some(character).filter(is_visible).unwrap_or('\u{fffd}')).collect()
}
