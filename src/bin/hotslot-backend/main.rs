//! hotslot-backend: vhost-user devices that hand files to a front-end, which maps them into its guest.
//!
//! Reading order:
//!
//! - `pmem`: a device; `backing`: its memory; `image`: its file, opened and locked;
//! - `device`: what a device is; `server`: the socket, one front-end after another; `session`: the requests
//!   of one; `channel`: requests to the front-end;
//! - `queues`: the threads that answer the driver's requests; `helpers`: more of them; `ring`: a virtqueue;
//!   `inflight`: what is left when this process is killed;
//! - `fs`: a directory, whose files are mapped as the guest asks;
//! - `blk`: a disk, which maps nothing, but reads and writes the mappings of others;
//! - `console`: a serial port, which is a socket here;
//! - `torture`: a back-end that misbehaves on demand;
//! - `sandbox`: what their threads may ask of the host.
//!
//! Exit status: 0 after SIGINT, SIGTERM, SIGHUP or the end of `--once`, 2 for a command line or a file that
//! cannot be served, 1 for everything else.

#![deny(unsafe_code)]

mod backing;
mod blk;
mod channel;
mod complaints;
mod console;
mod device;
mod error;
mod fs;
mod helpers;
mod image;
mod inflight;
mod lock;
mod pmem;
mod queues;
mod ring;
mod sandbox;
mod server;
mod session;
mod torture;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use hotslot::report::{fail, parsed, print, with_advice};
use hotslot::sandbox::{Mode, prepare};

use crate::error::Error;

/// vhost-user devices that hand files to a front-end, which maps them into its guest.
#[derive(Parser)]
#[command(name = "hotslot-backend", version, propagate_version = true)]
struct Cli {
    /// Whether each thread is confined to the system calls that it needs
    #[arg(long, global = true, value_name = "MODE", default_value = "on")]
    sandbox: Mode,

    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    Blk(blk::Args),
    Pmem(pmem::Args),
    Fs(fs::Args),
    Console(console::Args),
    Torture(torture::Args),
    /// Print the manual page of hotslot-backend, or of one of its devices
    Man {
        #[arg(value_parser = ["blk", "pmem", "fs", "console", "torture"])]
        device: Option<String>,
    },
    /// Print a completion script for a shell
    Completions {
        shell: Shell,
    },
}

/// For a word that is no device.
const ADVICE: &str = "the devices are blk, pmem, fs, console and torture; each takes its file or directory by an option (`hotslot-backend DEVICE --help`)";

fn main() -> ExitCode {
    let Cli { sandbox, action } = parsed(Cli::try_parse().map_err(|error| with_advice(error, ADVICE)));
    let prepared =
        prepare(sandbox).map_err(Error::NoSandbox).and_then(|()| server::outlive_file_size_limit());
    let served = prepared.and_then(|()| match action {
        Action::Blk(args) => blk::run(&args),
        Action::Pmem(args) => pmem::run(&args),
        Action::Fs(args) => fs::run(&args),
        Action::Console(args) => console::run(&args),
        Action::Torture(args) => torture::run(&args),
        Action::Man { device } => Ok(print(&mut io::stdout(), &manual(device.as_deref()))?),
        Action::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "hotslot-backend", &mut text);
            Ok(print(&mut io::stdout(), &text)?)
        }
    });
    served.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

/// The manual page of the program, or of its subcommand `device`.
fn manual(device: Option<&str>) -> Vec<u8> {
    // Gives the subcommands their full names and the global options.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let page = device.and_then(|name| command.find_subcommand(name).cloned()).unwrap_or(command);
    let mut text = Vec::new();
    // It only fails where a write to `text` does.
    let _never = clap_mangen::Man::new(page).render(&mut text);
    text
}
