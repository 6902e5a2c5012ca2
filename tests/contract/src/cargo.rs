//! Builds and runs tests by cargo, and reads what the test harness prints.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use crate::message::{Result, say};

/// The test program that boots Linux.
pub const LINUX: &str = "linux";

/// What became of one test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestResult {
    Ok,
    Failed,
    /// It could not run here, and printed why on standard error.
    Skipped,
    /// Another program runs it, or a user who asks for it.
    Ignored,
}

/// Builds one test program and runs these of its tests. A test that cargo does not have is missing in the
/// result.
pub fn run(program: &str, tests: &[&str]) -> Result<HashMap<String, TestResult>> {
    say(&format!("{program}: {} tests", tests.len()));
    let mut options: &[&str] = &[];
    if program == LINUX {
        install_linux_tools();
        // More at a time than processors: most of them only wait for a session.
        options = &["--test-threads=16"];
    }
    let built = cargo(program, &["--no-run"]).stdout(Stdio::null()).status();
    if !built.is_ok_and(|status| status.success()) {
        return Err(format!("{program}: it does not build"));
    }
    let known = cargo(program, &["--", "--list", "--format=terse"]).stderr(Stdio::inherit()).output();
    let known = known.map_err(|error| format!("cannot run cargo: {error}"))?;
    let known = parse_list(&String::from_utf8_lossy(&known.stdout));
    for test in tests.iter().filter(|test| !known.contains(&test.to_string())) {
        say(&format!("{program}: {test}: cited, but cargo has no such test"));
    }
    let arguments = [&["--", "--format=pretty", "--exact"], options, tests].concat();
    let (succeeded, out, err) = run_and_pass_on_errors(cargo(program, &arguments))?;
    if !succeeded {
        eprint!("{out}");
    }
    Ok(parse_results(&out, &err))
}

/// `cargo test` for one test program, with more arguments.
fn cargo(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["test", "--quiet", "--locked"]);
    match program {
        "lib" => command.arg("--lib"),
        _ => command.args(["--test", program]),
    };
    command.args(arguments).stdin(Stdio::null());
    command
}

/// What the tests that boot Linux need. It says itself what is missing and cannot be installed; the tests
/// that need it fail then.
fn install_linux_tools() {
    let script = ". scripts/lib.sh; linux_tools";
    let _failure_was_reported =
        Command::new("bash").args(["-c", script, "contract.sh"]).stdin(Stdio::null()).status();
}

/// Whether it succeeded, its standard output, and its standard error, which the user sees at once, too.
fn run_and_pass_on_errors(mut command: Command) -> Result<(bool, String, String)> {
    let failed = |error| format!("cannot run cargo: {error}");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let errors = child.stderr.take().map(|errors| {
        thread::spawn(move || {
            let (mut errors, mut kept) = (BufReader::new(errors), Vec::new());
            let mut shown = 0;
            while let Ok(1..) = errors.read_until(b'\n', &mut kept) {
                let _nobody_may_listen = std::io::stderr().write_all(&kept[shown..]);
                shown = kept.len();
            }
            kept
        })
    });
    let mut out = Vec::new();
    if let Some(mut stream) = child.stdout.take() {
        stream.read_to_end(&mut out).map_err(failed)?;
    }
    let succeeded = child.wait().map_err(failed)?.success();
    let err = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    Ok((succeeded, String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&err).into_owned()))
}

/// The tests' names in the harness's own list (`--list --format=terse`).
fn parse_list(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// The results in the harness's output (`--format=pretty`), with the tests that printed on standard error
/// that they were skipped (`SKIPPED: TEST: why`).
fn parse_results(out: &str, err: &str) -> HashMap<String, TestResult> {
    let skipped: Vec<&str> = err
        .lines()
        .filter_map(|line| line.strip_prefix("SKIPPED: "))
        .filter_map(|line| line.split_whitespace().next())
        .map(|word| word.strip_suffix(':').unwrap_or(word))
        .collect();
    let mut results = HashMap::new();
    for line in out.lines() {
        let Some((name, result)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... "))
        else {
            continue;
        };
        let name = name.split(" - ").next().unwrap_or_default();
        let result = match result {
            "ok" if skipped.contains(&name) => TestResult::Skipped,
            "ok" => TestResult::Ok,
            _ if result.starts_with("ignored") => TestResult::Ignored,
            _ => TestResult::Failed,
        };
        results.insert(name.to_owned(), result);
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_lists_its_tests() {
        let text = "tests::one: test\ntests::bench: benchmark\n\n1 test, 1 benchmark\n";
        assert_eq!(parse_list(text), ["tests::one"]);
    }

    #[test]
    fn each_line_of_the_harness_is_one_result() {
        let out = "\nrunning 5 tests\ntest a::good ... ok\ntest bad ... FAILED\ntest here ... ok\n\
            test late ... ignored, takes long ... very\ntest dies - should panic ... ok\n\nfailures:\n";
        let results = parse_results(out, "warning: x\nSKIPPED: here: no /dev/kvm\n");
        let expected = [
            ("a::good", TestResult::Ok),
            ("bad", TestResult::Failed),
            ("here", TestResult::Skipped),
            ("late", TestResult::Ignored),
            ("dies", TestResult::Ok),
        ];
        assert_eq!(results, expected.map(|(name, result)| (name.to_owned(), result)).into());
    }
}
