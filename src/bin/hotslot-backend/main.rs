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

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use hotslot::report::fail;
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
    device: Device,
}

#[derive(Subcommand)]
enum Device {
    Blk(blk::Args),
    Pmem(pmem::Args),
    Fs(fs::Args),
    Console(console::Args),
    Torture(torture::Args),
}

fn main() -> ExitCode {
    let Cli { sandbox, device } = Cli::parse();
    let prepared =
        prepare(sandbox).map_err(Error::NoSandbox).and_then(|()| server::outlive_file_size_limit());
    let served = prepared.and_then(|()| match device {
        Device::Blk(args) => blk::run(&args),
        Device::Pmem(args) => pmem::run(&args),
        Device::Fs(args) => fs::run(&args),
        Device::Console(args) => console::run(&args),
        Device::Torture(args) => torture::run(&args),
    });
    served.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}
