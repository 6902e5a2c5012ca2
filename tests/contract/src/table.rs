//! The table: each assertion with its state and its tests, then the sums.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use crate::assertions::Assertion;
use crate::cargo::TestResult;
use crate::citations::Citation;

/// What became of each test that ran: by test program and test.
pub type Results = HashMap<(String, String), TestResult>;

/// How much is printed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Details {
    /// The beginning of each text, the names of the tests.
    Short,
    /// Also where each test is.
    Places { whole_text: bool },
}

/// The most characters of a text in [`Details::Short`].
const SHORT: usize = 96;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Held,
    Tested,
    Broken,
    Skipped,
    Untested,
    NotYet,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Held => "held",
            State::Tested => "tested",
            State::Broken => "broken",
            State::Skipped => "skipped",
            State::Untested => "untested",
            State::NotYet => "not yet",
        }
    }
}

pub struct Table<'a> {
    rows: Vec<Row<'a>>,
    details: Details,
}

struct Row<'a> {
    assertion: &'a Assertion,
    state: State,
    /// Each test, with a word for a result that is not good.
    tests: Vec<(&'a Citation, &'static str)>,
}

impl Table<'_> {
    /// Without `results` nothing was run.
    pub fn new<'a>(
        assertions: &'a [Assertion],
        citations: &'a BTreeSet<Citation>,
        results: Option<&Results>,
        details: Details,
    ) -> Table<'a> {
        let row = |assertion: &'a Assertion| {
            let cited = citations.iter().filter(|citation| citation.number == assertion.number);
            let tests: Vec<_> = cited.map(|citation| (citation, word(citation, results))).collect();
            let has = |wanted: &[&str]| tests.iter().any(|(_, word)| wanted.contains(word));
            let state = if tests.is_empty() {
                if assertion.is_built { State::Untested } else { State::NotYet }
            } else if has(&["FAILED", "not run"]) {
                State::Broken
            } else if has(&["skipped"]) || tests.iter().all(|(_, word)| *word == "ignored") {
                State::Skipped
            } else if results.is_none() {
                State::Tested
            } else {
                State::Held
            };
            Row { assertion, state, tests }
        };
        Table { rows: assertions.iter().map(row).collect(), details }
    }

    fn count(&self, states: &[State]) -> usize {
        self.rows.iter().filter(|row| states.contains(&row.state)).count()
    }

    /// Assertions that are broken, skipped or untested.
    pub fn failed(&self) -> usize {
        self.count(&[State::Broken, State::Skipped, State::Untested])
    }
}

/// What the table says of a test: nothing of one that passed, or that was not to run.
fn word(citation: &Citation, results: Option<&Results>) -> &'static str {
    let Some(results) = results else { return "" };
    match results.get(&(citation.program.clone(), citation.test.clone())) {
        Some(TestResult::Ok) => "",
        Some(TestResult::Failed) => "FAILED",
        Some(TestResult::Skipped) => "skipped",
        Some(TestResult::Ignored) => "ignored",
        None => "not run",
    }
}

/// The beginning of a text, up to a space, when it is long.
fn shorten(text: &str) -> String {
    if text.chars().count() <= SHORT {
        return text.to_owned();
    }
    let start: String = text.chars().take(SHORT - 1).collect();
    let end = start.rfind(' ').unwrap_or(start.len());
    format!("{} ...", &start[..end])
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.rows {
            let text = match self.details {
                Details::Places { whole_text: true } => row.assertion.text.clone(),
                _ => shorten(&row.assertion.text),
            };
            let name = format!("SHM-{}", row.assertion.number);
            writeln!(f, "{name:<9} {:<8} {text}", row.state.name())?;
            for (citation, word) in &row.tests {
                write!(f, "      {}: {}", citation.program, citation.test)?;
                if self.details != Details::Short {
                    write!(f, "  ({})", citation.place)?;
                }
                if !word.is_empty() {
                    write!(f, "  {word}")?;
                }
                writeln!(f)?;
            }
        }
        let states: BTreeSet<State> = self.rows.iter().map(|row| row.state).collect();
        let sums: Vec<String> =
            states.iter().map(|state| format!("{} {}", self.count(&[*state]), state.name())).collect();
        writeln!(f, "{}", sums.join(", "))?;
        let passed = self.count(&[State::Held, State::Tested]);
        writeln!(f, "{passed} passed, {} failed", self.failed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assertions::parse;

    fn citation(number: u32, test: &str) -> Citation {
        let place = format!("tests/one.rs:{number}");
        Citation { number, program: "one".to_owned(), test: test.to_owned(), place }
    }

    #[test]
    fn each_assertion_has_the_state_that_its_tests_give_it() {
        let contract: String =
            (1..=7).map(|number| format!("- **SHM-{number}** (S) Text {number}.\n")).collect();
        let assertions = parse(&(contract + "## Not built yet\n| SHM-6 | why |\n"));
        let citations = BTreeSet::from([
            citation(1, "good"),
            citation(1, "ignored"),
            citation(2, "good"),
            citation(2, "bad"),
            citation(3, "skipped"),
            citation(4, "lost"),
            citation(7, "ignored"),
        ]);
        let key = |test: &str| ("one".to_owned(), test.to_owned());
        let results = Results::from([
            (key("good"), TestResult::Ok),
            (key("bad"), TestResult::Failed),
            (key("skipped"), TestResult::Skipped),
            (key("ignored"), TestResult::Ignored),
        ]);
        let table = Table::new(&assertions, &citations, Some(&results), Details::Short);
        assert_eq!(
            table.to_string(),
            "SHM-1     held     Text 1.\n      one: good\n      one: ignored  ignored\n\
             SHM-2     broken   Text 2.\n      one: bad  FAILED\n      one: good\n\
             SHM-3     skipped  Text 3.\n      one: skipped  skipped\n\
             SHM-4     broken   Text 4.\n      one: lost  not run\n\
             SHM-5     untested Text 5.\n\
             SHM-6     not yet  Text 6.\n\
             SHM-7     skipped  Text 7.\n      one: ignored  ignored\n\
             1 held, 2 broken, 2 skipped, 1 untested, 1 not yet\n1 passed, 5 failed\n"
        );
    }

    #[test]
    fn without_results_an_assertion_with_a_test_is_tested() {
        let assertions = parse("- **SHM-1** (S) Text.\n");
        let citations = BTreeSet::from([citation(1, "good")]);
        let table = Table::new(&assertions, &citations, None, Details::Places { whole_text: true });
        let expected =
            "SHM-1     tested   Text.\n      one: good  (tests/one.rs:1)\n1 tested\n1 passed, 0 failed\n";
        assert_eq!(table.to_string(), expected);
        assert_eq!(table.failed(), 0);
    }

    #[test]
    fn a_long_text_ends_at_a_word() {
        let text = "words ".repeat(20);
        let short = shorten(&text);
        assert!(short.len() <= SHORT + 4 && short.ends_with("words ..."), "{short}");
        assert_eq!(shorten("short"), "short");
    }
}
