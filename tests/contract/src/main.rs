//! Which tests prove which assertions of `src/contract.md`, and whether they hold. `scripts/contract.sh`
//! builds and starts this program, and its `--help` describes the options, the table and the exit status.
//!
//! Reading order: [`assertions`] (the contract's text), [`citations`] (the tests that cite it, found by
//! parsing the sources), [`cargo`] (building and running those tests), [`table`] (what is printed).

mod assertions;
mod cargo;
mod citations;
mod message;
mod sources;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use assertions::Assertion;
use citations::Citation;
use message::{Result, say};
use sources::Sources;

/// The contract, from the project's directory.
const CONTRACT: &str = "src/contract.md";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let options = match parse(&words) {
        Ok(options) => options,
        Err(sentence) => return wrong(&sentence),
    };
    run(&options).unwrap_or_else(|sentence| {
        say(&sentence);
        ExitCode::FAILURE
    })
}

/// A wrong command line has the exit status that it has in the scripts.
fn wrong(sentence: &str) -> ExitCode {
    say(sentence);
    ExitCode::from(2)
}

#[derive(Debug, Default, PartialEq)]
struct Options {
    /// Run nothing.
    list: bool,
    /// Leave out the tests that boot Linux.
    quick: bool,
    /// Only these assertions; empty: all.
    numbers: Vec<u32>,
}

fn parse(words: &[String]) -> Result<Options> {
    let mut options = Options::default();
    for word in words {
        match word.as_str() {
            "--list" => options.list = true,
            "quick" => options.quick = true,
            digits if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                let number = digits.parse().map_err(|_| format!("there is no SHM-{digits} in {CONTRACT}"))?;
                options.numbers.push(number);
            }
            _ => return Err(format!("{word}: not understood (--help lists the options)")),
        }
    }
    Ok(options)
}

/// Runs in the project's directory. Succeeds when every assertion that was asked for holds.
fn run(options: &Options) -> Result<ExitCode> {
    let text = fs::read_to_string(CONTRACT).map_err(|error| format!("cannot read {CONTRACT}: {error}"))?;
    let mut assertions = assertions::parse(&text);
    let mut citations = citations::find(&Sources::new(Path::new(".")))?;
    check_cited(&assertions, &citations)?;
    if let Some(number) = options.numbers.iter().find(|number| !exists(&assertions, **number)) {
        return Ok(wrong(&format!("there is no SHM-{number} in {CONTRACT}")));
    }
    if !options.numbers.is_empty() {
        assertions.retain(|assertion| options.numbers.contains(&assertion.number));
        citations.retain(|citation| options.numbers.contains(&citation.number));
    }
    if options.quick {
        citations.retain(|citation| citation.program != cargo::LINUX);
    }
    let results = if options.list {
        None
    } else {
        if !options.numbers.is_empty() {
            assertions.iter().for_each(|assertion| println!("SHM-{}: {}", assertion.number, assertion.text));
            println!();
        }
        Some(run_tests(&citations)?)
    };
    let details = if options.numbers.is_empty() {
        table::Details::Short
    } else {
        table::Details::Places { whole_text: options.list }
    };
    let table = table::Table::new(&assertions, &citations, results.as_ref(), details);
    print!("{table}");
    Ok(if table.failed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn exists(assertions: &[Assertion], number: u32) -> bool {
    assertions.iter().any(|assertion| assertion.number == number)
}

/// Every number that is cited exists.
fn check_cited(assertions: &[Assertion], citations: &BTreeSet<Citation>) -> Result<()> {
    let unknown = citations.iter().filter(|citation| !exists(assertions, citation.number));
    let unknown: Vec<String> = unknown.map(Citation::to_string).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(format!("cited, but not in {CONTRACT}:\n{}", unknown.join("\n")))
}

/// Runs each cited test once, one test program after the other.
fn run_tests(citations: &BTreeSet<Citation>) -> Result<table::Results> {
    let mut programs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for citation in citations {
        let tests = programs.entry(&citation.program).or_default();
        if !tests.contains(&citation.test.as_str()) {
            tests.push(&citation.test);
        }
    }
    let mut results = table::Results::new();
    for (program, tests) in programs {
        for (test, result) in cargo::run(program, &tests)? {
            results.insert((program.to_owned(), test), result);
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_come_in_any_order() {
        let expected = Options { list: true, quick: true, numbers: vec![35, 69] };
        assert_eq!(options("35 quick --list 69"), Ok(expected));
        assert_eq!(options(""), Ok(Options::default()));
    }

    #[test]
    fn other_words_are_refused() {
        for word in ["fast", "-1", "SHM-35", "99999999999"] {
            assert!(options(word).is_err(), "{word}");
        }
    }

    #[test]
    fn numbers_that_the_contract_lacks_are_refused() {
        let assertions = assertions::parse("- **SHM-1** (S) Text.\n");
        let citation = |number| Citation {
            number,
            program: "lib".to_owned(),
            test: "tests::one".to_owned(),
            place: "src/lib.rs:7".to_owned(),
        };
        assert!(exists(&assertions, 1) && !exists(&assertions, 2));
        assert_eq!(check_cited(&assertions, &[citation(1)].into()), Ok(()));
        let error = check_cited(&assertions, &[citation(1), citation(3)].into()).unwrap_err();
        assert!(error.ends_with("SHM-3: lib: tests::one (src/lib.rs:7)"), "{error}");
    }
}
