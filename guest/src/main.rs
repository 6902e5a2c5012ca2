//! One static program with three jobs, told apart by how it is started (like busybox):
//!
//! - as PID 1 of a guest or of the emulated host, it is `init`: see [`boot`];
//! - as `probe`, or with `probe` as its first argument, it checks one thing from inside the guest: see
//!   [`probe`];
//! - with `lab` as its first argument, on the developer's machine, it runs the emulated host and is the far
//!   end of its link: see [`lab::outside`]. `scripts/lab.sh` starts it so.
//!
//! What it reads, and from where, is in `guest/README.md`.

mod boot;
mod console;
mod counter;
mod files;
mod finish;
mod hammer;
mod keep;
mod lab;
mod map;
mod modules;
mod outcome;
mod parameters;
mod probe;
mod rights;
mod speed;
mod sys;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        boot::run();
    }
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let started_as =
        arguments.first().and_then(|name| Path::new(name).file_name()).map(|name| name.as_bytes().to_vec());
    if !arguments.is_empty() {
        arguments.remove(0);
    }
    if started_as.as_deref() == Some(b"probe") {
        return probe::main(&arguments);
    }
    match arguments.first().map(|word| word.as_bytes()) {
        Some(b"probe") => probe::main(&arguments[1..]),
        Some(b"lab") => lab::outside::main(&arguments[1..]),
        _ => {
            eprintln!("init: this is PID 1 of a hotslot guest; elsewhere it takes `probe ...` or `lab ...`");
            ExitCode::from(2)
        }
    }
}
