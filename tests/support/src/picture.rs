//! What a picture (SVG) must hold to: it is well-formed XML, and nothing in it overlaps.

use roxmltree::{Document, Node};

/// The width of a character of 12 pixels: 0.6 of that, in monospace fonts.
const COLUMN: f64 = 7.23;

/// Left, top, right and bottom.
#[derive(Clone, Copy, Debug)]
struct Place([f64; 4]);

impl Place {
    fn meets(&self, other: &Place) -> bool {
        let (Place([left, top, right, bottom]), Place(other)) = (self, other);
        *left < other[2] && other[0] < *right && *top < other[3] && other[1] < *bottom
    }

    fn is_in(&self, outer: &Place) -> bool {
        let (Place([left, top, right, bottom]), Place(outer)) = (self, outer);
        outer[0] <= *left && outer[1] <= *top && *right <= outer[2] && *bottom <= outer[3]
    }
}

fn number(node: &Node, name: &str) -> f64 {
    node.attribute(name).map_or(0.0, |value| value.parse().unwrap())
}

fn of_box(node: &Node) -> Place {
    let (x, y) = (number(node, "x"), number(node, "y"));
    Place([x, y, x + number(node, "width"), y + number(node, "height")])
}

fn of_text(node: &Node, text: &str) -> Place {
    let columns: u32 = text.chars().map(|character| if character.is_ascii() { 1 } else { 2 }).sum();
    let (x, y, width) = (number(node, "x"), number(node, "y"), f64::from(columns) * COLUMN);
    let left = match node.attribute("text-anchor") {
        Some("middle") => x - width / 2.0,
        Some("end") => x - width,
        _ => x,
    };
    Place([left, y - 10.0, left + width, y + 3.0])
}

/// Checks a picture. The result is its texts.
///
/// Texts meet no other text and no edge of a box; boxes are beside or in each other; all is inside the
/// picture.
pub fn texts(svg: &str) -> Vec<String> {
    let document = Document::parse(svg).unwrap_or_else(|error| panic!("{error}:\n{svg}"));
    let elements = |name: &'static str| document.descendants().filter(move |node| node.has_tag_name(name));
    assert!(elements("style").any(|style| style.text().unwrap().contains("prefers-color-scheme:dark")));
    let whole = of_box(&document.root_element());
    let boxes: Vec<_> = elements("rect").map(|node| of_box(&node)).collect();
    let texts: Vec<_> = elements("text")
        .map(|node| {
            let text = node.text().unwrap_or_default().trim().to_owned();
            (of_text(&node, &text), text)
        })
        .filter(|(_, text)| !text.is_empty())
        .collect();
    for (number, (place, text)) in texts.iter().enumerate() {
        assert!(place.is_in(&whole), "{text:?} at {place:?} leaves the picture");
        for (other, other_text) in &texts[..number] {
            assert!(!place.meets(other), "{text:?} at {place:?} meets {other_text:?} at {other:?}");
        }
        for edges in &boxes {
            assert!(
                place.is_in(edges) || !place.meets(edges),
                "{text:?} at {place:?} meets the box {edges:?}"
            );
        }
    }
    for (number, place) in boxes.iter().enumerate() {
        assert!(place.is_in(&whole), "the box {place:?} leaves the picture");
        for other in &boxes[..number] {
            let is_nested = place.is_in(other) || other.is_in(place);
            assert!(is_nested || !place.meets(other), "the boxes {place:?} and {other:?} overlap");
        }
    }
    texts.into_iter().map(|(_, text)| text).collect()
}

/// The boxes of a class: left, top, right and bottom.
pub fn boxes(svg: &str, class: &str) -> Vec<[f64; 4]> {
    let document = Document::parse(svg).unwrap();
    let is_one = |node: &Node| node.has_tag_name("rect") && node.attribute("class") == Some(class);
    document.descendants().filter(is_one).map(|node| of_box(&node).0).collect()
}
