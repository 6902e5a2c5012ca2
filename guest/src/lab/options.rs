//! The options of `init lab`, which `scripts/lab.sh` and `scripts/run.sh` give. Pure but for the working
//! directory and the terminal's size.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::link::Start;
use crate::outcome::Outcome;
use crate::sys;

const USAGE: &str = "usage: init lab --qemu PATH --kernel FILE --initramfs FILE... [--memory MIB] [--icount]
    [--append WORDS] [--timeout SECONDS] [--tty] [--env NAME=VALUE]... [--out PATH]... [--log FILE] [--verbose]
    [--backend PATH --share DIR...] -- COMMAND [ARG...]
or: init lab --script FILE [--timeout SECONDS] [--tty] [--env NAME=VALUE]... [--verbose] -- COMMAND [ARG...]
(scripts/lab.sh and scripts/run.sh make the files and start it)";

/// What `scripts/lab.sh` or `scripts/run.sh` asked for.
#[derive(Debug, Default)]
pub struct Options {
    /// Starts a guest of hotslot; in place of the emulated host, to which the fields up to `append` belong.
    pub script: Option<PathBuf>,
    pub qemu: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: Vec<PathBuf>,
    /// As QEMU takes it; without a suffix, in MiB.
    pub memory: String,
    pub icount: bool,
    pub append: OsString,
    pub timeout: Option<Duration>,
    pub log: Option<PathBuf>,
    pub verbose: bool,
    pub terminal: bool,
    /// `hotslot-backend`, which serves the directories in `start.shares`.
    pub backend: PathBuf,
    pub start: Start,
}

impl Options {
    pub fn names(&self) -> Names {
        match self.script {
            Some(_) => Names { script: "run.sh", machine: "guest" },
            None => Names { script: "lab", machine: "emulated host" },
        }
    }
}

/// How sentences for the user name what the user started, and the machine.
#[derive(Clone, Copy)]
pub struct Names {
    pub script: &'static str,
    pub machine: &'static str,
}

pub fn parse(arguments: &[OsString]) -> Outcome<Options> {
    let mut options = Options { memory: "2048".to_owned(), ..Options::default() };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let mut value = || {
            let value = words.next().cloned();
            value.ok_or_else(|| format!("{} needs a value\n{USAGE}", word.to_string_lossy()))
        };
        match word.to_str().unwrap_or_default() {
            "--script" => options.script = Some(value()?.into()),
            "--qemu" => options.qemu = value()?.into(),
            "--kernel" => options.kernel = value()?.into(),
            "--initramfs" => options.initramfs.push(value()?.into()),
            "--memory" => options.memory = value()?.to_string_lossy().into_owned(),
            "--icount" => options.icount = true,
            "--timeout" => {
                let text = value()?.to_string_lossy().into_owned();
                let seconds = text.parse().ok().filter(|seconds| *seconds > 0);
                let seconds = seconds.ok_or_else(|| {
                    format!("--timeout {text}: this is not a whole number of seconds above 0")
                })?;
                options.timeout = Some(Duration::from_secs(seconds));
            }
            "--tty" => options.terminal = true,
            "--env" => options.start.environment.push(value()?.into_vec()),
            "--out" => options.start.outputs.push(value()?.into_vec()),
            "--append" => options.append = value()?,
            "--log" => options.log = Some(value()?.into()),
            "--verbose" => options.verbose = true,
            "--backend" => options.backend = value()?.into(),
            "--share" => options.start.shares.push(value()?.into_vec()),
            "--" => break,
            other => return Err(format!("{other}: unknown option\n{USAGE}")),
        }
    }
    options.start.command = words.map(|word| word.clone().into_vec()).collect();
    let is_missing = |path: &Path| path.as_os_str().is_empty();
    let no_machine = is_missing(&options.kernel)
        || is_missing(&options.qemu)
        || (is_missing(&options.backend) && !options.start.shares.is_empty());
    if options.start.command.is_empty() || (no_machine && options.script.is_none()) {
        return Err(format!(
            "a COMMAND, and --script or --qemu, --kernel, and --backend with --share are needed\n{USAGE}"
        ));
    }
    let as_path = |bytes| Path::new(OsStr::from_bytes(bytes));
    // The root directory is mounted elsewhere.
    for share in
        options.start.shares.iter().map(|share| as_path(share)).filter(|path| *path != Path::new("/"))
    {
        // The file that is sent back would be emptied here before it is read there: it is one file.
        if let Some(output) = options.start.outputs.iter().find(|output| as_path(output).starts_with(share)) {
            return Err(format!("--out {}: it is shared already", as_path(output).display()));
        }
    }
    let directory =
        std::env::current_dir().map_err(|error| format!("cannot read the working directory: {error}"))?;
    options.start.directory = directory.into_os_string().into_vec();
    if options.terminal {
        options.start.terminal = Some(sys::window_size(io::stdout()).unwrap_or((24, 80)));
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn options_end_at_the_dashes() {
        let line = "--qemu q --kernel k --initramfs a --initramfs b --timeout 5 --env A=b --out /o \
            --backend b --share /s -- sh --tty";
        let options = parse(&words(line)).unwrap();
        assert_eq!(options.initramfs, [Path::new("a"), Path::new("b")]);
        assert_eq!(options.timeout, Some(Duration::from_secs(5)));
        assert_eq!(options.start.command, [b"sh".to_vec(), b"--tty".to_vec()]);
        assert_eq!(options.start.environment, [b"A=b".to_vec()]);
        assert_eq!(options.start.outputs, [b"/o".to_vec()]);
        assert_eq!(options.start.shares, [b"/s".to_vec()]);
        assert!(!options.terminal && options.start.terminal.is_none());
    }

    #[test]
    fn wrong_options_are_refused() {
        assert!(parse(&words("--script s -- sh")).is_ok());
        assert!(parse(&words("--qemu q --kernel k --backend b --share / --out /o -- sh")).is_ok());
        let lines = [
            "--kernel",
            "--script s",
            "--timeout 0",
            "--timeout x",
            "--nonsense",
            "--qemu q --kernel k --",
            "--qemu q --kernel k --share /s -- sh",
            "--qemu q --kernel k --backend b --share /s --out /s/file -- sh",
        ];
        for line in lines {
            assert!(parse(&words(line)).is_err(), "{line}");
        }
    }
}
