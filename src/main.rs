//! The program: parse, build, run, and say how it ended.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use hotslot::arch::x86_64::layout::Layout;
use hotslot::cli::Cli;
use hotslot::config::DEFAULT_CMDLINE;
use hotslot::exit::STATUS_USAGE;
use hotslot::report::{say, with_causes};
use hotslot::vmm::Vmm;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = start_log(&cli) {
        return fail(&*error, None, STATUS_USAGE);
    }
    if cli.print_layout {
        let text = format!("{Layout}\ndefault kernel command line:\n  {DEFAULT_CMDLINE}");
        // Unlike with `println!`, a reader that is gone does not matter.
        let _nobody_reads = writeln!(io::stdout(), "{text}");
        return ExitCode::SUCCESS;
    }
    let Some(config) = cli.into_config() else {
        // The parser does not let this through.
        return ExitCode::from(STATUS_USAGE);
    };
    match Vmm::build(&config).and_then(Vmm::run) {
        Ok(exit) => {
            say(format_args!("hotslot: {exit}"));
            ExitCode::from(&exit)
        }
        Err(error) => fail(&error, error.hint(), error.status()),
    }
}

/// Prints an error with all its causes, each once.
fn fail(error: &dyn Error, hint: Option<String>, status: u8) -> ExitCode {
    say(format_args!("error: {}", with_causes(error)));
    if let Some(hint) = hint {
        say(format_args!("hint: {hint}"));
    }
    ExitCode::from(status)
}

fn start_log(cli: &Cli) -> Result<(), Box<dyn Error>> {
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
        let file = std::fs::File::create(path)
            .map_err(|error| format!("cannot open the log file {}: {error}", path.display()))?;
        builder.format_timestamp_micros().target(env_logger::Target::Pipe(Box::new(file)));
    }
    builder.try_init()?;
    Ok(())
}
