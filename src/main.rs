//! The program: parse, build, run.

use std::io::{self, Write};
use std::path::PathBuf;

use hotslot::arch::x86_64::layout::Layout;
use hotslot::cli::{Cli, Command, LayoutFormat};
use hotslot::config::DEFAULT_CMDLINE;
use hotslot::kvm;
use hotslot::report::{self, Failure, STATUS_ERROR, STATUS_USAGE, failure_text, lines};
use hotslot::sandbox::{self, SandboxError};
use hotslot::terminal;
use hotslot::trace::show::show;
use hotslot::vmm::Vmm;
use hotslot::vmm::layout_picture::draw_layout;

fn main() {
    match run(Cli::from_arguments(terminal::columns().is_some_and(|columns| columns < 80))) {
        Ok(()) => lines::end("", 0),
        Err(failure) => lines::end(&failure_text(&*failure), failure.status()),
    }
}

fn run(cli: Cli) -> Result<(), Box<dyn Failure>> {
    fail_beyond_file_size_limit();
    if let Some(Command::Trace(trace)) = &cli.command {
        return Ok(show(&trace.file, trace.form(), trace.when(), &mut io::stdout())?);
    }
    sandbox::prepare(cli.sandbox).map_err(NoSandbox)?;
    lines::start().map_err(NoThread)?;
    cli.check_files()?;
    start_log(&cli)?;
    let mut text = cli.text_to_print();
    if cli.version {
        text.extend(kvm::vm::describe().into_bytes());
    }
    match cli.print_layout {
        None => {}
        Some(LayoutFormat::Text) => {
            text.extend(
                format!("{Layout}\ndefault kernel command line:\n  {DEFAULT_CMDLINE}\n").into_bytes(),
            );
        }
        Some(LayoutFormat::Svg) => {
            text.extend(draw_layout(cli.memory, &cli.vhost_user)?.into_bytes());
        }
    }
    if !text.is_empty() {
        return Ok(report::print(&mut io::stdout(), &text)?);
    }
    let config = cli.into_config().expect("invariant: the parser demands a kernel");
    Vmm::build(&config)?.run()
}

/// What goes beyond the limit of file sizes (RLIMIT_FSIZE) fails with EFBIG: guest memory, the guest's serial
/// output, messages. By default SIGXFSZ would end the process.
fn fail_beyond_file_size_limit() {
    // SAFETY: no handler runs: the signal is ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

#[derive(Debug, thiserror::Error)]
#[error("there can be no sandbox")]
struct NoSandbox(#[source] SandboxError);

impl Failure for NoSandbox {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }

    fn hint(&self) -> Option<String> {
        Some(sandbox::HINT.to_owned())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread that writes messages")]
struct NoThread(#[source] io::Error);

impl Failure for NoThread {
    fn status(&self) -> u8 {
        STATUS_ERROR
    }
}

#[derive(Debug, thiserror::Error)]
enum LogError {
    #[error("cannot open the log file {0}")]
    File(PathBuf, #[source] io::Error),
    #[error("`{0}` does not say what to log: it is LEVEL or MODULE=LEVEL, where LEVEL is {LEVELS}")]
    Spec(String),
}

/// The levels of `--log`.
const LEVELS: &str = "off, error, warn, info, debug or trace";

impl Failure for LogError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }
}

fn start_log(cli: &Cli) -> Result<(), LogError> {
    let mut builder = env_logger::Builder::new();
    let default = ["warn", "info", "debug"][usize::from(cli.verbose).min(2)];
    let spec = cli.log.as_deref().unwrap_or(default);
    // The parser of env_logger leaves out what it does not understand.
    let level = |part: &&str| part.rsplit('=').next().unwrap_or_default().parse::<log::LevelFilter>();
    if let Some(part) = spec.split(',').find(|part| level(part).is_err()) {
        return Err(LogError::Spec(part.to_owned()));
    }
    builder.parse_filters(spec);
    builder.format(|out, record| {
        let level = record.level().as_str().to_lowercase();
        writeln!(out, "hotslot: {level}: {}", record.args())
    });
    if let Some(path) = &cli.log_file {
        let file = report::create(path).map_err(|error| LogError::File(path.clone(), error))?;
        builder
            .format_timestamp_micros()
            .target(env_logger::Target::Pipe(Box::new(lines::Log::to_file(file))));
    } else {
        builder.target(env_logger::Target::Pipe(Box::new(lines::Log::to_stderr())));
    }
    builder.init();
    Ok(())
}
