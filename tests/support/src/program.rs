//! The program `hotslot-backend`, as a process: started, watched, ended. Every wait has a deadline: the one
//! for the program ends it, and so whatever waits for it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::built::{self, hotslot_backend};

pub const DEADLINE: Duration = Duration::from_secs(30);
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

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited for {what} in vain");
        thread::sleep(Duration::from_millis(2));
    }
}

/// In a directory, where it listens on [`SOCKET`].
pub fn command(device: &str, dir: &TempDir) -> Command {
    let mut command = Command::new(hotslot_backend());
    command.current_dir(dir.path()).args([device, "--socket", SOCKET]);
    command
}

/// A running back-end. It is killed at the deadline and when this is dropped.
pub struct Backend {
    child: Arc<Mutex<Child>>,
    pub socket: PathBuf,
    stderr: Arc<Mutex<String>>,
    _alive: mpsc::Sender<()>,
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
        let socket = dir.path().join(SOCKET);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = Arc::new(Mutex::new(String::new()));
        let (pipe, lines) = (child.stderr.take().unwrap(), Arc::clone(&stderr));
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                *lines.lock().unwrap() += &(line + "\n");
            }
        });
        let child = Arc::new(Mutex::new(child));
        let (_alive, dropped) = mpsc::channel();
        let watched = Arc::clone(&child);
        thread::spawn(move || {
            if dropped.recv_timeout(DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = watched.lock().unwrap().kill();
            }
        });
        let backend = Backend { child, socket, stderr, _alive };
        backend.wait_for("listening on ");
        backend
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    pub fn wait_for(&self, words: &str) {
        wait_until(&format!("{words:?} on stderr"), || {
            assert!(self.is_running(), "the program has ended: {}", self.stderr());
            self.stderr().contains(words)
        });
    }

    pub fn pid(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    pub fn is_running(&self) -> bool {
        self.child.lock().unwrap().try_wait().unwrap().is_none()
    }

    pub fn wait(&self) -> ExitStatus {
        wait_until("the end of the program", || !self.is_running());
        self.child.lock().unwrap().try_wait().unwrap().unwrap()
    }

    /// A socket name of at most 107 bytes, wherever the build is.
    pub fn connect(&self) -> UnixStream {
        let dir = File::open(self.socket.parent().unwrap()).unwrap();
        let stream = UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd())).unwrap();
        // For raw bytes; the crate's front-end asks again, until the deadline ends the program.
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
        if thread::panicking() {
            eprintln!("the back-end said:\n{}", self.stderr());
        }
    }
}

/// Runs it to its end. A program that listens instead is killed.
fn run(device: &str, dir: &TempDir, args: &str) -> Output {
    let mut child = Command::new(hotslot_backend())
        .current_dir(dir.path())
        .arg(device)
        .args(args.split_whitespace())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

pub fn assert_refused(device: &str, dir: &TempDir, args: &str, sentence: &str) {
    let output = run(device, dir, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(stderr.contains(sentence), "{args:?}: {stderr}");
    assert!(!stderr.contains("listening on "), "{args:?}: {stderr}");
}
