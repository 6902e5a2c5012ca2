//! PID 1: from the kernel's hand-over to the end of the machine.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::outcome::{Outcome, failed};
use crate::parameters::{self, Parameters};
use crate::{console, finish, lab, modules, sys};

/// Where `scripts/image.sh` puts a command: its words, each followed by a NUL.
const COMMAND: &str = "/etc/hotslot/command";

/// The command where neither the kernel's command line nor the image names one.
const SHELL: &str = "/bin/sh";

/// The kernel's file systems: type, place, options.
const MOUNTS: [(&str, &str, &str); 6] = [
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", "mode=755"),
    // ptmxmode: without it only root of the first instance could open a pseudo-terminal.
    ("devpts", "/dev/pts", "mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("debugfs", "/sys/kernel/debug", ""),
];

/// Directories, with their modes. The root is a tmpfs already, and the image may have put files here: a mount
/// would hide them.
const DIRECTORIES: [(&str, u32); 3] = [("/run", 0o755), ("/tmp", 0o1777), ("/root", 0o700)];

/// The whole life of the machine, as its user space sees it.
pub fn run() -> ! {
    for (kind, place, options) in MOUNTS {
        // A kernel without one of them (debugfs, say) is still of use.
        complain(sys::mount(kind, kind, Path::new(place), options));
    }
    for (place, mode) in DIRECTORIES {
        complain(make_directory(place, mode));
    }
    take_console();
    link_descriptors();
    sys::loopback_up();

    let parameters = read_parameters();
    for sentence in &parameters.complaints {
        eprintln!("init: {sentence}");
    }
    for sentence in modules::load(parameters.modules.as_deref()) {
        eprintln!("init: {sentence}");
    }
    // Held until the machine ends: the kernel patches itself at each first and last machine, and under
    // emulation some runs hung there.
    let _idle_vm = if parameters.hold_vm { complain(hold_vm()) } else { None };
    set_environment();

    if let Some(port) = &parameters.link {
        let sentence = lab::inside::serve(port);
        eprintln!("init: {sentence}");
        finish::end_machine(1, None);
    }
    finish::obey_signals();
    let command = choose_command(&parameters);
    let status = console::run(&command);
    if status != 0 && parameters.debug_exit.is_none() {
        eprintln!("init: {} ended with status {status}", command.join(" "));
    }
    finish::end_machine(status, parameters.debug_exit);
}

fn make_directory(place: &str, mode: u32) -> Outcome<()> {
    fs::create_dir_all(place)
        .and_then(|()| fs::set_permissions(place, fs::Permissions::from_mode(mode)))
        .map_err(failed("make", Path::new(place)))
}

/// The command line's command, else the image's, else a shell.
fn choose_command(parameters: &Parameters) -> Vec<String> {
    if !parameters.command.is_empty() {
        return parameters.command.clone();
    }
    match fs::read(COMMAND) {
        Ok(words) => {
            let text = String::from_utf8_lossy(&words);
            text.split_terminator('\0').map(str::to_owned).collect()
        }
        Err(_) => vec![SHELL.to_owned()],
    }
}

fn read_parameters() -> Parameters {
    let path = Path::new("/proc/cmdline");
    let line = fs::read_to_string(path).map_err(failed("read", path));
    parameters::parse(&complain(line).unwrap_or_default())
}

/// Opens the console of the `/dev` that we have just mounted as our standard files. (The kernel did it from
/// the image's `/dev`, which may not have had one.)
fn take_console() {
    let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") else {
        return;
    };
    let replaced = [dup2_stdin(&console), dup2_stdout(&console), dup2_stderr(&console)];
    for error in replaced.iter().filter_map(|result| result.err()) {
        eprintln!("init: cannot use /dev/console: {error}");
    }
}

/// What udev would link: scripts expect these names.
fn link_descriptors() {
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    for (target, link) in links {
        complain(symlink(target, link).map_err(failed("link", Path::new(link))));
    }
}

fn hold_vm() -> Outcome<OwnedFd> {
    let path = Path::new("/dev/kvm");
    let kvm = File::options().read(true).write(true).open(path).map_err(failed("open", path))?;
    sys::create_vm(&kvm).map_err(|error| format!("cannot create a machine on /dev/kvm: {error}"))
}

/// The environment of every command. The kernel passes each `NAME=VALUE` of its command line to PID 1, and
/// HOME from there stays.
fn set_environment() {
    let defaults =
        [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root")];
    for (name, value) in defaults {
        if name == "PATH" || std::env::var_os(name).is_none_or(|value| value == "/") {
            // SAFETY: no other thread exists yet that could read the environment.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// Reports an error; the boot goes on.
fn complain<T>(outcome: Outcome<T>) -> Option<T> {
    outcome.map_err(|sentence| eprintln!("init: {sentence}")).ok()
}
