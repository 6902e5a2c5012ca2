//! The program `hotslot-backend` on a file or a directory, as a process.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use tempfile::TempDir;

use crate::built::{self, hotslot_backend};
use crate::child::{self, Running};

/// When the program is killed: a thread that waits for it then goes on, such as the front-end of the `vhost`
/// crate, which knows no deadlines.
pub const DEADLINE: Duration = Duration::from_secs(300);
/// Relative, as socket addresses are short and directories of builds are not.
const SOCKET: &str = "s";

/// A directory that is on the same disk as the build: its files are written back, unlike those of a tmpfs.
pub fn directory() -> TempDir {
    TempDir::new_in(built::scratch()).unwrap()
}

/// The file `memory.img`, sparse.
pub fn file(dir: &TempDir, len: u64) -> PathBuf {
    let path = dir.path().join("memory.img");
    let file = File::create(&path).unwrap();
    file.set_len(len).unwrap();
    path
}

/// In a directory, where it listens on `SOCKET`.
pub fn command(device: &str, dir: &TempDir) -> Command {
    let mut command = Command::new(hotslot_backend());
    command.current_dir(dir.path()).args([device, "--socket", SOCKET]);
    command
}

/// A running back-end. It is killed at the deadline and when this is dropped.
pub struct Backend {
    program: Running,
    pub socket: PathBuf,
    _dir: Option<TempDir>,
}

impl Backend {
    /// Starts a device of it on the file `memory.img`, and waits until it listens.
    pub fn start(device: &str, dir: &TempDir, args: &str) -> Self {
        let mut command = command(device, dir);
        command.args(["--file", "memory.img"]).args(args.split_whitespace());
        Backend::spawn(command, dir)
    }

    /// Starts it by a [`command`], and waits until it listens.
    pub fn spawn(mut command: Command, dir: &TempDir) -> Self {
        let program = Running::start(&mut command).for_at_most(DEADLINE);
        program.wait_for("listening on ");
        Backend { program, socket: dir.path().join(SOCKET), _dir: None }
    }

    /// Starts a device of it on a sparse file in a directory of its own: [`Self::file`].
    pub fn on_file(device: &str, len: u64, args: &str) -> Self {
        let dir = directory();
        file(&dir, len);
        let backend = Backend::start(device, &dir, args);
        Backend { _dir: Some(dir), ..backend }
    }

    /// The file `memory.img`.
    pub fn file(&self) -> PathBuf {
        self.socket.with_file_name("memory.img")
    }

    pub fn stderr(&self) -> String {
        self.program.said()
    }

    pub fn wait_for(&self, words: &str) {
        self.program.wait_for(words);
    }

    pub fn pid(&self) -> u32 {
        self.program.pid() as u32
    }

    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    pub fn is_running(&self) -> bool {
        self.program.is_running()
    }

    pub fn wait(&self) -> ExitStatus {
        self.program.wait().0
    }

    /// A connection to it: its path would be too long for a socket address.
    pub fn connect(&self) -> UnixStream {
        let dir = File::open(self.socket.parent().unwrap()).unwrap();
        let stream = UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd())).unwrap();
        // For raw bytes; the crate's front-end asks again, until the deadline ends the program.
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }
}

/// A device of it, started by a shell after `script`, in a mount namespace of its own; the file system that
/// the script mounts is seen at `/proc/PID/root`. None, with a word on stderr, where the script fails: it may
/// need root.
pub fn start_after(script: &str, device: &str, dir: &TempDir, args: &str) -> Option<Backend> {
    let shell = |last: &str| {
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.arg("--map-root-user");
        }
        let script = format!("set -e; PATH=$PATH:/usr/sbin:/sbin; {script}\n{last}");
        command.current_dir(dir.path()).args(["--mount", "sh", "-c", &script]);
        command
    };
    let probe = shell("").output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: this cannot be set up here: {probe:?}");
        return None;
    }
    let last = format!("exec {:?} {device} --socket {SOCKET} {args}", hotslot_backend());
    Some(Backend::spawn(shell(&last), dir))
}

/// For [`start_after`]: `full` is a small tmpfs, `full/memory.img` a larger, sparse file.
pub const FULL: &str = "mkdir -p full; mount -t tmpfs -o size=1m none full; truncate -s 4M full/memory.img";

/// For [`start_after`]: `full/disk/memory.img` is on an ext4 whose own disk is full, so that writes to it
/// succeed, and the write-back fails.
pub const FAILS_LATER: &str = "mkdir -p full; mount -t tmpfs -o size=8m none full; mkdir full/disk;
    truncate -s 64M full/ext4.img; mkfs.ext4 -q -O ^has_journal full/ext4.img;
    mount -o loop full/ext4.img full/disk;
    truncate -s 32M full/disk/memory.img";

/// Such a command line is refused in a sentence with this in it.
pub fn assert_refused(device: &str, dir: &TempDir, args: &str, sentence: &str) {
    let mut command = Command::new(hotslot_backend());
    let output = child::run(command.current_dir(dir.path()).arg(device).args(args.split_whitespace()));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(stderr.contains(sentence), "{args:?}: {stderr}");
    assert!(!stderr.contains("listening on "), "{args:?}: {stderr}");
}
