//! hotslot-backend: vhost-user devices that hand files to a front-end, which maps them into its guest.
//!
//! Reading order: `pmem` (a device), `backing` (its file), `requests` (its queue), `server` (the socket, one
//! front-end after another), `fs` (a directory, whose files are mapped as the guest asks), `blk` (a disk,
//! which maps nothing, but reads and writes what others map), `torture` (one that misbehaves on demand).
//!
//! Exit status: 0 after SIGINT, SIGTERM or the end of `--once`, 2 for a command line or a file that cannot be
//! served, 1 for everything else.

#![forbid(unsafe_code)]

mod backing;
mod blk;
mod fs;
mod pmem;
mod requests;
mod server;
mod torture;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use hotslot::report::say;

/// vhost-user devices that hand files to a front-end, which maps them into its guest.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    device: Device,
}

#[derive(Subcommand)]
enum Device {
    Blk(blk::Args),
    Pmem(pmem::Args),
    Fs(fs::Args),
    Torture(torture::Args),
}

fn main() -> ExitCode {
    let failure = match Cli::parse().device {
        Device::Blk(args) => blk::run(&args).err().map(|e| (e.status(), e.hint(), chain(&e))),
        Device::Pmem(args) => pmem::run(&args).err().map(|e| (e.status(), e.hint(), chain(&e))),
        Device::Fs(args) => fs::run(&args).err().map(|e| (e.status(), e.hint(), chain(&e))),
        Device::Torture(args) => torture::run(&args).err().map(|e| (e.status(), e.hint(), chain(&e))),
    };
    let Some((status, hint, sentence)) = failure else {
        return ExitCode::SUCCESS;
    };
    say(format_args!("error: {sentence}"));
    if let Some(hint) = hint {
        say(format_args!("hint: {hint}"));
    }
    ExitCode::from(status)
}

/// An error and what caused it, in one sentence.
fn chain(error: &dyn Error) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        sentence.push_str(": ");
        sentence.push_str(&error.to_string());
        cause = error.source();
    }
    sentence
}
