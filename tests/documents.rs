//! What is written stays true where a program can tell: each link of a page leads to a file, and to a heading
//! of it.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Of rustdoc alone: it gives the links of the manual their places in the documentation.
const FOR_RUSTDOC: &str = "src/manual/links.md";

/// The pages of the project: those at its root and in `src`.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = Vec::new();
    for directory in ["", "src", "src/manual"] {
        let entries = fs::read_dir(root.join(directory)).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(entries.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    pages.retain(|page| *page != root.join(FOR_RUSTDOC));
    assert!(pages.len() > 15, "{pages:?}");
    pages
}

/// Where the links of a page lead: `[text](target)` and `[label]: target`.
fn links(text: &str) -> Vec<&str> {
    let inline = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let labels = text.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: "));
    inline.chain(labels.map(|(_, target)| target)).filter(|target| !target.contains("://")).collect()
}

/// The anchors that a forge gives the headings of a page.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let words = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        words.chars().filter(|letter| letter.is_alphanumeric() || "-_".contains(*letter)).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_leads_somewhere() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for link in links(&text) {
            let (file, anchor) =
                link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: no file {link}", page.display());
            if let Some(anchor) = anchor {
                let there = anchors(&fs::read_to_string(&target).unwrap());
                assert!(there.contains(anchor), "{}: no heading {link}", page.display());
            }
        }
    }
}

/// A label that a page of the manual gives a file has its place in the documentation, too.
#[test]
fn every_link_of_the_manual_leads_somewhere_in_rustdoc() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let known = fs::read_to_string(root.join(FOR_RUSTDOC)).unwrap();
    for page in pages().iter().filter(|page| page.starts_with(root.join("src/manual"))) {
        for line in fs::read_to_string(page).unwrap().lines().filter(|line| line.starts_with('[')) {
            let Some((label, _)) = line.split_once("]: ") else { continue };
            assert!(known.contains(&format!("{label}]: crate::")), "{}: {label}]", page.display());
        }
    }
}
