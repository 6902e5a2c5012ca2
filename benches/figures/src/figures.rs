//! The lines that the parts of `scripts/bench.sh` write. [`crate::table`] and [`crate::picture`] show them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::catalog::{self, Entry};

/// Why there is no table and no picture.
#[derive(Debug, Error)]
pub enum Problem {
    #[error("cannot read {0}")]
    Unreadable(PathBuf, #[source] io::Error),
    #[error("line {number} is no figure: {line:?}; a figure is NAME@SUBJECT MIN MEDIAN P99 MAX")]
    NoFigure { number: usize, line: String },
    #[error("{0} is not what criterion writes")]
    NotCriterion(PathBuf),
}

/// What one subject took, in the unit of its [`Entry`].
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The program that was measured, or the floor: what is behind the `@`.
    pub subject: String,
    pub min: f64,
    pub median: f64,
    pub p99: f64,
    pub max: f64,
}

/// All samples of one name.
#[derive(Debug)]
pub struct Figure {
    pub entry: Entry,
    /// In the order of the file.
    pub samples: Vec<Sample>,
}

impl Figure {
    /// What the others are compared with: the first of [`catalog::REFERENCES`] that was measured.
    pub fn reference(&self) -> Option<&Sample> {
        let named = |name: &&str| self.samples.iter().find(|sample| sample.subject == **name);
        catalog::REFERENCES.iter().find_map(named).filter(|_| self.samples.len() > 1)
    }
}

/// One run of `scripts/bench.sh`.
#[derive(Debug)]
pub struct Run {
    /// Date, machine and the like, without the `#`.
    pub remarks: Vec<String>,
    /// In the order of the catalog; those that it does not know come last.
    pub figures: Vec<Figure>,
}

/// Reads the figures of a run.
pub fn read(file: &Path) -> Result<Run, Problem> {
    let text = fs::read_to_string(file).map_err(|error| Problem::Unreadable(file.to_owned(), error))?;
    parse(&text)
}

/// The same, of a text. Of two lines for one subject the later one counts: a part was repeated.
pub fn parse(text: &str) -> Result<Run, Problem> {
    let mut run = Run { remarks: Vec::new(), figures: Vec::new() };
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(remark) = line.strip_prefix('#') {
            run.remarks.push(remark.trim().to_owned());
            continue;
        }
        if line.trim().is_empty() {
            continue;
        }
        let no_figure = || Problem::NoFigure { number, line: line.to_owned() };
        let (name, sample) = sample(line).ok_or_else(no_figure)?;
        let place = run.figures.iter_mut().find(|figure| figure.entry.name == name);
        let Some(Figure { samples, .. }) = place else {
            run.figures.push(Figure { entry: catalog::entry(name), samples: vec![sample] });
            continue;
        };
        match samples.iter_mut().find(|other| other.subject == sample.subject) {
            Some(other) => *other = sample,
            None => samples.push(sample),
        }
    }
    run.figures.sort_by_key(|figure| catalog::place(&figure.entry.name));
    Ok(run)
}

fn sample(line: &str) -> Option<(&str, Sample)> {
    let mut words = line.split_whitespace();
    let (name, subject) = words.next()?.split_once('@')?;
    let mut number =
        || words.next()?.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    let [min, median, p99, max] = [number()?, number()?, number()?, number()?];
    let is_ordered = min <= median && median <= p99 && p99 <= max && words.next().is_none();
    is_ordered.then(|| (name, Sample { subject: subject.to_owned(), min, median, p99, max }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn figures_are_in_the_order_of_the_catalog_and_the_last_line_counts() {
        let run = parse(
            "# date: today\nown@a 1 2 3 4\n\nunmap-same-4k@hotslot 1 2 3 4\nmap-same-4k@hotslot 1 2 3 4\n\
             map-same-4k@bare 1 1.5 2 2\nmap-same-4k@hotslot 2 3 4 5\n",
        )
        .unwrap();
        assert_eq!(run.remarks, ["date: today"]);
        let names: Vec<_> = run.figures.iter().map(|figure| figure.entry.name.as_str()).collect();
        assert_eq!(names, ["map-same-4k", "unmap-same-4k", "own"]);
        let [hotslot, bare] = run.figures[0].samples.as_slice() else { panic!() };
        assert_eq!((hotslot.subject.as_str(), hotslot.median), ("hotslot", 3.0));
        assert_eq!(run.figures[0].reference(), Some(bare));
        assert_eq!(run.figures[1].reference(), None);
    }

    #[test]
    fn what_is_no_figure_is_refused_with_its_line() {
        for line in ["a 1 2 3 4", "a@b 1 2 3", "a@b 1 2 3 4 5", "a@b 1 2 x 4", "a@b 4 3 2 1", "a@b -1 2 3 4"]
        {
            let problem = parse(&format!("#\n{line}\n")).unwrap_err();
            assert!(problem.to_string().starts_with("line 2 is no figure"), "{line}");
        }
    }
}
