//! The command line: the only source of the configuration. The doc comments here are its help text.

use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{self, Path, PathBuf};
use std::time::Duration;

use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::config::device::{self, DeviceSpec};
use crate::config::{
    BackendLoss, Config, DEBUG_EXIT_CMDLINE, DEFAULT_CMDLINE, GdbAddress, HugePages, SerialLine,
    UnavailablePage, parse_duration,
};
use crate::report::{Failure, STATUS_USAGE, parsed, with_advice};
use crate::sandbox::Mode;
use crate::size;
use crate::trace::show::{Form, Sequence, parse_seconds};

/// Boot a Linux kernel on KVM, with virtio devices that are other processes (vhost-user back-ends)
///
/// The guest's output goes to stdout. Messages of hotslot go to stderr; the last one says how the machine
/// ended. On a terminal, Ctrl-a x quits and Ctrl-a h lists the other keys.
#[derive(Debug, Parser)]
#[command(
    name = "hotslot",
    override_usage = "hotslot --kernel <FILE> [OPTIONS]\n       hotslot trace <FILE> [--sequence <FORM> | --timeline]",
    version,
    disable_version_flag = true,
    max_term_width = 110,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    after_help = AFTER
)]
pub struct Cli {
    /// What to do instead of running a machine
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The kernel: a bzImage, an ELF vmlinux, or an ELF file with a PVH note
    #[arg(short, long, value_name = "FILE", help_heading = KERNEL, required_unless_present = "print")]
    pub kernel: Option<PathBuf>,

    /// The initial RAM file system; given again, the kernel unpacks one after the other
    #[arg(help_heading = KERNEL, short, long, value_name = "FILE")]
    pub initramfs: Vec<PathBuf>,

    /// Kernel command line, appended to the default "console=ttyS0 8250.nr_uarts=1
    /// cryptomgr.notests panic=-1 reboot=panic_warm" (and "hotslot.debug_exit=0xf4" with --debug-exit)
    #[arg(help_heading = KERNEL, short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,

    /// Do not use the default kernel command line
    #[arg(help_heading = KERNEL, long)]
    pub no_default_cmdline: bool,

    /// Guest memory: bytes, or a number with the unit K, M, G or T
    #[arg(help_heading = MACHINE, short, long, value_name = "SIZE", default_value = "512M", allow_negative_numbers = true, value_parser = size::parse)]
    pub memory: u64,

    /// Which part of the guest's memory is in huge pages
    #[arg(help_heading = MACHINE, long, value_name = "PART", default_value = "kernel")]
    pub hugepages: HugePages,

    /// Number of virtual processors
    #[arg(help_heading = MACHINE, long, value_name = "NUMBER", default_value_t = 1, allow_negative_numbers = true, value_parser = cpus)]
    pub cpus: u32,

    /// Add a virtio device whose back-end listens on a Unix socket
    #[arg(help_heading = DEVICES, long, value_name = "PATH,type=TYPE[,KEY=VALUE]...", long_help = device::help())]
    pub vhost_user: Vec<DeviceSpec>,

    /// What the guest's serial port is connected to: stdio, off or file=PATH
    #[arg(help_heading = MACHINE, long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialLine,

    /// How long to wait until a back-end accepts a connection, as in 5s or 500ms
    #[arg(help_heading = DEVICES, long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    pub connect_timeout: Duration,

    /// Add a debug-exit port: the byte that the guest writes to I/O port 0xf4 is the exit status
    #[arg(help_heading = MACHINE, long)]
    pub debug_exit: bool,

    /// Wait for gdb before the guest's first instruction: on this port of 127.0.0.1, or on a Unix socket that
    /// is made. `target remote :PORT` or `target remote PATH` in gdb connects
    #[arg(help_heading = MACHINE, long, value_name = "PORT|unix:PATH")]
    pub gdb: Option<GdbAddress>,

    /// Write an ELF core for gdb and crash to this file: when the guest crashes or its kernel panics, at an
    /// error of hotslot, and at SIGUSR2, after which the guest goes on. The machine's end waits for it up to
    /// 60 seconds, or until another signal that ends the machine
    #[arg(help_heading = MACHINE, long, value_name = "FILE")]
    pub dump: Option<PathBuf>,

    /// What to do when the guest needs a page of a mapping that the host cannot provide (a full disk, an I/O
    /// error)
    #[arg(help_heading = DEVICES, long, value_name = "WHAT", default_value = "wait")]
    pub unavailable_page: UnavailablePage,

    /// What to do when a device loses its back-end permanently: the back-end died or broke the protocol, and
    /// the device has no `reconnect=`, or that time is over
    #[arg(help_heading = DEVICES, long, value_name = "WHAT", default_value = "keep")]
    pub backend_loss: BackendLoss,

    /// Whether each thread is confined to the system calls that it needs, and none opens a file once the
    /// guest runs
    #[arg(help_heading = HOST, long, value_name = "MODE", default_value = "on")]
    pub sandbox: Mode,

    /// Log more; twice for debug messages
    #[arg(help_heading = HOST, short, long, action = ArgAction::Count, conflicts_with = "log")]
    pub verbose: u8,

    /// Choose what to log: LEVEL or MODULE=LEVEL, comma-separated
    #[arg(help_heading = HOST, long, value_name = "SPEC")]
    pub log: Option<String>,

    /// Log to this file instead of stderr
    #[arg(help_heading = HOST, long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// Record in this file what passes between the guest, hotslot and the back-ends; `hotslot trace FILE`
    /// prints it
    #[arg(help_heading = HOST, long, value_name = "FILE")]
    pub trace_vhost_user: Option<PathBuf>,

    /// Draw the guest physical memory with all live mappings into this file, as SVG: at each SIGUSR1, and at
    /// the end
    #[arg(help_heading = HOST, long, value_name = "FILE")]
    pub memory_picture: Option<PathBuf>,

    /// Write the machine's statistics into this file, which is emptied first: a line of JSON at each
    /// SIGUSR1 and at the end. SIGUSR1 also prints them, and so does the end with -v
    #[arg(help_heading = HOST, long, value_name = "FILE")]
    pub stats: Option<PathBuf>,

    /// Print the machine's fixed addresses, ports and interrupts, and its default kernel command line; with
    /// =svg a picture of the memory that --memory and --vhost-user configure
    #[arg(long, help_heading = ABOUT, group = "print", value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub print_layout: Option<LayoutFormat>,

    /// Print a completion script for this shell
    #[arg(long, help_heading = ABOUT, group = "print", value_name = "SHELL")]
    pub print_completions: Option<Shell>,

    /// Print the manual page
    #[arg(long, help_heading = ABOUT, group = "print")]
    pub print_man: bool,

    /// Print the version, and what this host's KVM can do
    #[arg(short = 'V', long, help_heading = ABOUT, group = "print")]
    pub version: bool,
}

/// What hotslot does besides running a machine.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a trace that --trace-vhost-user wrote: a line for each record
    Trace(Trace),
}

/// How to print a trace.
#[derive(Debug, Args)]
pub struct Trace {
    /// The trace
    pub file: PathBuf,

    /// Print a sequence diagram instead, in this form. All of the trace between --from and --to is in memory
    /// then
    #[arg(long, value_name = "FORM")]
    pub sequence: Option<Sequence>,

    /// Print a picture (SVG) of each shared memory region instead: its mappings over time. All of the trace
    /// between --from and --to is in memory then
    #[arg(long, conflicts_with = "sequence")]
    pub timeline: bool,

    /// Leave out what began earlier, in seconds as the trace has them
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = parse_seconds)]
    pub from: Option<u64>,

    /// Leave out what began later
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = parse_seconds)]
    pub to: Option<u64>,
}

impl Trace {
    /// The form that was asked for.
    pub fn form(&self) -> Form {
        let form = self.sequence.map_or(Form::Text, Form::Sequence);
        if self.timeline { Form::Timeline } else { form }
    }

    /// The times that were asked for, in nanoseconds.
    pub fn when(&self) -> RangeInclusive<u64> {
        self.from.unwrap_or(0)..=self.to.unwrap_or(u64::MAX)
    }
}

/// In which form the layout is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LayoutFormat {
    /// A table
    Text,
    /// A picture
    Svg,
}

// The groups of options in the help.
const KERNEL: &str = "Kernel";
const MACHINE: &str = "Machine";
const DEVICES: &str = "Devices";
const HOST: &str = "Messages and confinement";
const ABOUT: &str = "About hotslot";

/// A number of processors; how many there can be is KVM's to say.
fn cpus(text: &str) -> Result<u32, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "it is a number, at least 1".to_owned())
}

const AFTER: &str = "Examples:
  hotslot -k bzImage -i initramfs.cpio
  hotslot -k bzImage -i initramfs.cpio --cpus 2 -m 1G --debug-exit -c quiet
  hotslot -k vmlinux -i initramfs.cpio --vhost-user /run/share.sock,type=fs --vhost-user /run/disk.sock,type=blk

Traces:
  hotslot trace FILE prints what --trace-vhost-user FILE recorded, a line for each message; with
  --sequence svg or mermaid it prints a sequence diagram, with --timeline each region's mappings over time

Signals:
  SIGTERM, SIGINT, SIGHUP, SIGQUIT end the machine at once; the guest is not asked. A dump that is being
  written has up to 60 s more
  SIGUSR1 prints the memory map with all live mappings, and statistics; draws the map with --memory-picture
  SIGUSR2 with --dump writes a dump; else it ends the machine
  Before there is a machine (while hotslot waits for a back-end) each of these ends it at once, without a message

Exit status:
  0      the guest switched itself off
  1      an error of hotslot
  2      wrong usage or configuration
  32     the guest reset itself
  33     it crashed: triple fault (also by reboot=t), KVM internal error
  34     its kernel panicked (reboot=panic_warm, or pvpanic)
  35     with --unavailable-page exit: the host cannot provide a page of a mapping
  40     with --backend-loss exit: a device lost its back-end
  128+n  signal n; 130 also Ctrl-a x, 137 also `kill` in gdb
  n      the byte that the guest wrote to the port of --debug-exit";

impl Cli {
    /// Parses the program's arguments. On a narrow terminal the help has its texts below the options.
    pub fn from_arguments(is_narrow: bool) -> Cli {
        let command = Cli::command().next_line_help(is_narrow);
        let matches = command.try_get_matches().map_err(|error| {
            with_advice(
                error,
                "-k FILE names the kernel, -i FILE an initramfs; the one subcommand is `trace`",
            )
        });
        parsed(matches.and_then(|matches| Cli::from_arg_matches(&matches)))
    }

    /// What one of the options asks for that only print something that this module knows.
    pub fn text_to_print(&self) -> Vec<u8> {
        let mut text = Vec::new();
        if let Some(shell) = self.print_completions {
            clap_complete::generate(shell, &mut Cli::command(), "hotslot", &mut text);
        } else if self.print_man {
            // One page has it all: `AFTER` says what the subcommand does, which has no page of its own.
            let command = Cli::command().mut_subcommand("trace", |trace| trace.hide(true));
            // It only fails where a write to `text` does.
            let _never = clap_mangen::Man::new(command).render(&mut text);
        } else if self.version {
            text.extend(Cli::command().render_version().into_bytes());
        }
        text
    }

    /// Checks that no output goes to a file that another option names: each output empties its file.
    ///
    /// # Errors
    ///
    /// One does.
    pub fn check_files(&self) -> Result<(), SameFile> {
        let serial = if let SerialLine::File(path) = &self.serial { Some(path) } else { None };
        let outputs = [
            ("--memory-picture", self.memory_picture.as_ref()),
            ("--log-file", self.log_file.as_ref()),
            ("--trace-vhost-user", self.trace_vhost_user.as_ref()),
            ("--dump", self.dump.as_ref()),
            ("--stats", self.stats.as_ref()),
            ("--serial", serial),
        ];
        let inputs = self.initramfs.iter().map(|path| ("--initramfs", Some(path)));
        let inputs = inputs.chain([("--kernel", self.kernel.as_ref())]);
        let mut others: Vec<_> = inputs.filter_map(|(option, path)| Some((option, named(path?)))).collect();
        for (option, path) in outputs.into_iter().filter_map(|(option, path)| Some((option, path?))) {
            let named = named(path);
            // Several outputs may go to a terminal, or to /dev/null.
            let is_special = std::fs::metadata(path).is_ok_and(|found| !found.is_file());
            match others.iter().find(|(_, other)| *other == named) {
                Some(&(other, _)) if !is_special => {
                    return Err(SameFile { option, other, path: path.clone() });
                }
                _ => others.push((option, named)),
            }
        }
        Ok(())
    }

    /// The configuration; `None` without a kernel, which only `--print-layout` allows.
    pub fn into_config(self) -> Option<Config> {
        let default = (!self.no_default_cmdline).then(|| DEFAULT_CMDLINE.to_owned());
        let debug_exit = (default.is_some() && self.debug_exit).then(|| DEBUG_EXIT_CMDLINE.to_owned());
        let cmdline: Vec<String> = default.into_iter().chain(debug_exit).chain(self.cmdline).collect();
        Some(Config {
            kernel: self.kernel?,
            initramfs: self.initramfs,
            cmdline: cmdline.join(" "),
            memory: self.memory,
            hugepages: self.hugepages,
            cpus: self.cpus,
            devices: self.vhost_user,
            serial: self.serial,
            connect_timeout: self.connect_timeout,
            debug_exit: self.debug_exit,
            memory_picture: self.memory_picture,
            unavailable_page: self.unavailable_page,
            backend_loss: self.backend_loss,
            trace: self.trace_vhost_user,
            gdb: self.gdb,
            dump: self.dump,
            stats: self.stats,
        })
    }
}

/// The file that a path names, or would name.
#[derive(PartialEq)]
enum Named {
    /// By device and inode: a file may have several names (links).
    Found(u64, u64),
    /// Where it would be made.
    ToBe(PathBuf),
}

fn named(path: &Path) -> Named {
    if let Ok(found) = std::fs::metadata(path) {
        return Named::Found(found.dev(), found.ino());
    }
    let path = path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let to_be = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
    Named::ToBe(to_be().unwrap_or(path))
}

/// An output that would empty another file of the command line.
#[derive(Debug, thiserror::Error)]
#[error("{option} and {other} name the same file, {path}: each needs a file of its own", path = .path.display())]
pub struct SameFile {
    option: &'static str,
    other: &'static str,
    path: PathBuf,
}

impl Failure for SameFile {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["hotslot"], arguments].concat())
    }

    fn config(arguments: &[&str]) -> Config {
        parse(arguments).unwrap().into_config().unwrap()
    }

    #[test]
    fn the_command_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_kernel_command_line_is_the_default_and_then_the_users() {
        assert_eq!(config(&["-k", "k"]).cmdline, DEFAULT_CMDLINE);
        assert_eq!(config(&["-k", "k", "-c", "quiet"]).cmdline, format!("{DEFAULT_CMDLINE} quiet"));
        let debug_exit = config(&["-k", "k", "--debug-exit", "-c", "quiet"]).cmdline;
        assert_eq!(debug_exit, format!("{DEFAULT_CMDLINE} {DEBUG_EXIT_CMDLINE} quiet"));
        assert_eq!(config(&["-k", "k", "-c", "--", "--no-default-cmdline"]).cmdline, "--");
        assert_eq!(config(&["-k", "k", "--no-default-cmdline"]).cmdline, "");
    }

    #[test]
    fn the_help_shows_the_default_command_line_and_nothing_unfinished() {
        let help = Cli::command().render_long_help().to_string().replace('\n', " ");
        let squeezed = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(squeezed.contains(&format!("\"{DEFAULT_CMDLINE}\"")), "{help}");
        assert!(!help.contains("on-reboot"));
    }

    #[test]
    fn wrong_values_are_named_with_their_option() {
        for (arguments, parts) in [
            (&["-m", "lots"][..], ["--memory", "\"lots\" is not a size"]),
            (&["-m", "16777216T"], ["--memory", "more than 2^64 - 1 bytes"]),
            (&["--cpus", "0"], ["--cpus", "a number, at least 1"]),
            (&["--cpus", "-1"], ["--cpus", "-1"]),
            (&["--cpus", "many"], ["--cpus", "many"]),
            (&["--vhost-user", "a,type=fs,x=1"], ["--vhost-user", "unknown key `x`"]),
            (&["--serial", "pty"], ["--serial", "`pty` is not a good serial line"]),
            (&["--gdb", "localhost:1234"], ["--gdb", "`localhost:1234` is not a good address for gdb"]),
            (&["--connect-timeout", "soon"], ["--connect-timeout", "`soon` is not a good time span"]),
        ] {
            let error = parse(&[&["-k", "k"], arguments].concat()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            for part in parts {
                assert!(error.to_string().contains(part), "{arguments:?}: {error}");
            }
        }
        assert!(parse(&[]).unwrap_err().to_string().contains("--kernel"));
        assert!(parse(&["--print-layout"]).unwrap().into_config().is_none());
    }
}
