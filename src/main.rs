//! The program: parse, build, run, and say how it ended.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use hotslot::arch::x86_64::layout::Layout;
use hotslot::cli::Cli;
use hotslot::config::DEFAULT_CMDLINE;
use hotslot::report::{Failure, STATUS_USAGE, fail, say};
use hotslot::vmm::Vmm;

fn main() -> ExitCode {
    run(Cli::parse()).unwrap_or_else(|failure| fail(&*failure))
}

fn run(cli: Cli) -> Result<ExitCode, Box<dyn Failure>> {
    start_log(&cli)?;
    if cli.print_layout {
        // Unlike `println!`, this does not panic when stdout is closed.
        let _closed = writeln!(io::stdout(), "{Layout}\ndefault kernel command line:\n  {DEFAULT_CMDLINE}");
        return Ok(ExitCode::SUCCESS);
    }
    let config = cli.into_config().expect("invariant: the parser demands a kernel");
    let exit = Vmm::build(&config)?.run()?;
    say(format_args!("hotslot: {exit}"));
    Ok(ExitCode::from(u8::from(&exit)))
}

#[derive(Debug, thiserror::Error)]
#[error("cannot open the log file {0}")]
struct LogFileError(PathBuf, #[source] io::Error);

impl Failure for LogFileError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }
}

fn start_log(cli: &Cli) -> Result<(), LogFileError> {
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(match (&cli.log, cli.verbose) {
        (Some(spec), _) => spec,
        (None, 0) => "warn",
        (None, 1) => "info",
        (None, _) => "debug",
    });
    builder.format(|out, record| {
        let level = record.level().as_str().to_lowercase();
        writeln!(out, "hotslot: {level}: {}", record.args())
    });
    if let Some(path) = &cli.log_file {
        let file = std::fs::File::create(path).map_err(|error| LogFileError(path.clone(), error))?;
        builder.format_timestamp_micros().target(env_logger::Target::Pipe(Box::new(file)));
    }
    builder.init();
    Ok(())
}
