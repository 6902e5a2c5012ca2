//! A program as a child of the test. Every wait for it has an end, and it is killed when the test lets go of
//! it.

use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::wait::PATIENCE;

/// A program that runs. What it prints on stderr goes to a file.
pub struct Running {
    child: Arc<Mutex<Child>>,
    said: NamedTempFile,
    _alive: Option<mpsc::Sender<()>>,
}

impl Running {
    pub fn start(command: &mut Command) -> Running {
        let said = NamedTempFile::new().unwrap();
        let child = command.stderr(said.reopen().unwrap()).spawn().unwrap();
        Running { child: Arc::new(Mutex::new(child)), said, _alive: None }
    }

    /// The same, with stdout in the same file.
    pub fn start_with_stdout(command: &mut Command) -> Running {
        let said = NamedTempFile::new().unwrap();
        let file = said.reopen().unwrap();
        let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Running { child: Arc::new(Mutex::new(child)), said, _alive: None }
    }

    /// Kills it after this time, so that a thread which waits for it goes on, too.
    pub fn for_at_most(mut self, time: Duration) -> Running {
        let (alive, dropped) = mpsc::channel();
        let child = Arc::clone(&self.child);
        thread::spawn(move || {
            if dropped.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = child.lock().unwrap().kill();
            }
        });
        self._alive = Some(alive);
        self
    }

    /// Its stdin and stdout, which are pipes.
    pub fn pipes(&self) -> (ChildStdin, ChildStdout) {
        let mut child = self.child.lock().unwrap();
        (child.stdin.take().unwrap(), child.stdout.take().unwrap())
    }

    /// What it has printed so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.said.path()).unwrap()
    }

    /// Waits until it has printed `text`.
    pub fn wait_for(&self, text: &str) {
        self.wait_until(&format!("{text:?} is printed"), || self.said().contains(text));
    }

    /// Waits until something is so, which it may never be once the program has ended.
    pub fn wait_until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        loop {
            let has_ended = !self.is_running();
            if is_so() {
                return;
            }
            assert!(!has_ended, "not so: {what}; the program has ended, and said:\n{}", self.said());
            assert!(start.elapsed() < PATIENCE, "not so: {what}; the program said:\n{}", self.said());
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.lock().unwrap().id() as i32
    }

    pub fn is_running(&self) -> bool {
        self.child.lock().unwrap().try_wait().unwrap().is_none()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        signal_child(&mut self.child.lock().unwrap(), signal);
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Waits for its end; gives its status and what it printed.
    pub fn wait(&self) -> (ExitStatus, String) {
        (wait(&mut self.child.lock().unwrap()), self.said())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap();
        // It has ended already in most tests.
        let _ = child.kill();
        let _ = child.wait();
        if thread::panicking() {
            eprintln!("the program said:\n{}", self.said());
        }
    }
}

/// Sends a signal to a child that was not waited for.
pub fn signal_child(child: &mut Child, signal: i32) {
    assert_eq!(child.try_wait().unwrap(), None, "it has ended");
    // SAFETY: no memory is involved, and the number is still the child's, which was not waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// Waits for the end of a child. One that does not end is killed, and the test fails.
pub fn wait(child: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("the program does not end");
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for the end of a child that prints little: its status, and what it printed into pipes.
pub fn finish(mut child: Child) -> Output {
    wait(&mut child);
    child.wait_with_output().unwrap()
}

/// Runs a program to its end, without stdin: its status, and what it printed.
pub fn run(command: &mut Command) -> Output {
    finish(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}
