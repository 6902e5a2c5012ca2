//! The figures as a table for a terminal.

use crate::catalog::Unit;
use crate::figures::{Figure, Run, Sample};

/// All figures, with what the run says of itself in front.
pub fn text(run: &Run) -> String {
    let mut text: String = run.remarks.iter().map(|remark| format!("{remark}\n")).collect();
    let heads = ["minimum", "median", "p99", "maximum", "ratio", "p99 ratio"];
    text += &format!("\n{:48}{}\n", "", heads.map(|head| format!("{head:>11}")).concat());
    for figure in &run.figures {
        let scale = Scale::of(figure);
        text += &format!("{}{}\n", figure.entry.title, scale.name);
        for sample in &figure.samples {
            let numbers =
                [sample.min, sample.median, sample.p99, sample.max].map(|number| scale.text(number));
            let ratios = ratios(figure, sample).map(|ratio| ratio.map_or("-".to_owned(), ratio_text));
            let cells: String = numbers.iter().chain(&ratios).map(|cell| format!("{cell:>11}")).collect();
            text += &format!("    {:44}{cells}\n", sample.subject);
        }
    }
    text
}

/// The median and the 99th percentile of a sample, as multiples of those of the figure's reference.
pub fn ratios(figure: &Figure, sample: &Sample) -> [Option<f64>; 2] {
    let of = |number: f64, of: f64| (of > 0.0).then(|| number / of);
    figure.reference().map_or([None, None], |reference| {
        [of(sample.median, reference.median), of(sample.p99, reference.p99)]
    })
}

/// A ratio, to three decimals where it is about 1.
pub fn ratio_text(ratio: f64) -> String {
    if ratio < 9.9995 { format!("{ratio:.3}") } else { format!("{ratio:.1}") }
}

/// In which unit the numbers of a figure are shown.
pub struct Scale {
    /// With a comma before it, or nothing where the title says it.
    pub name: &'static str,
    one: f64,
    decimals: usize,
}

impl Scale {
    /// The unit of times is the largest in which the least median is at least 1.
    pub fn of(figure: &Figure) -> Scale {
        let least = figure.samples.iter().map(|sample| sample.median).fold(f64::INFINITY, f64::min);
        let (name, one, decimals) = match figure.entry.unit {
            Unit::Time if least >= 1e9 => (", s", 1e9, 3),
            Unit::Time if least >= 1e6 => (", ms", 1e6, 1),
            Unit::Time if least >= 1e3 => (", us", 1e3, 1),
            Unit::Time => (", ns", 1.0, 1),
            Unit::MiB => ("", f64::from(1 << 20), 2),
            Unit::MB => ("", 1e6, 2),
            Unit::Ticks | Unit::Number => ("", 1.0, 0),
        };
        Scale { name, one, decimals }
    }

    /// A number in this unit.
    pub fn text(&self, number: f64) -> String {
        format!("{:.*}", self.decimals, number / self.one)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use crate::figures::parse;

    #[test]
    fn a_table_has_units_and_ratios_to_the_reference() {
        let run = parse("# machine: one\nmap-same-4k@hotslot 1000 3000 9000 9000\nmap-same-4k@bare 1000 2000 3000 3000\nstripped@hotslot 2500000 2500000 2500000 2500000\n").unwrap();
        let text = super::text(&run);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(text.lines().next(), Some("machine: one"));
        assert!(text.contains("MAP of 4 KiB, a range that comes again, us\n"));
        assert!(lines.contains(&vec!["hotslot", "1.0", "3.0", "9.0", "9.0", "1.500", "3.000"]), "{text}");
        assert!(lines.contains(&vec!["bare", "1.0", "2.0", "3.0", "3.0", "1.000", "1.000"]), "{text}");
        assert!(lines.contains(&vec!["hotslot", "2.50", "2.50", "2.50", "2.50", "-", "-"]), "{text}");
    }
}
