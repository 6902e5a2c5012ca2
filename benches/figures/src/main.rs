//! What `scripts/bench.sh` measured, as a table (`hotslot-figures table FILE`) and as a picture
//! (`hotslot-figures picture FILE`); and what `criterion` measured, as lines of `NAME: NUMBER`
//! (`hotslot-figures criterion DIR`).
//!
//! A figure is a line `NAME@SUBJECT MIN MEDIAN P99 MAX`. What NAME means, and its unit, is in [`catalog`].

mod catalog;
mod criterion;
mod figures;
mod picture;
mod table;

use std::path::Path;
use std::process::ExitCode;

use figures::{Problem, read};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let text = match words.as_slice() {
        ["table", file] => read(Path::new(file)).map(|run| table::text(&run)),
        ["picture", file] => read(Path::new(file)).map(|run| picture::draw(&run)),
        ["criterion", directory] => criterion::lines(Path::new(directory)),
        _ => {
            eprintln!("usage: hotslot-figures table FILE | picture FILE | criterion DIR");
            return ExitCode::from(2);
        }
    };
    match text {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("hotslot-figures: {}", chain(&problem));
            ExitCode::FAILURE
        }
    }
}

/// The sentence of an error, with those of its causes.
fn chain(problem: &Problem) -> String {
    let causes = std::iter::successors(Some(problem as &dyn std::error::Error), |error| error.source());
    causes.map(|error| error.to_string()).collect::<Vec<_>>().join(": ")
}
