//! A running `hotslot-backend torture`.

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::{NamedTempFile, TempDir};

/// Longer than anything here takes, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Torture {
    dir: TempDir,
    process: Child,
    output: NamedTempFile,
}

impl Torture {
    /// Starts it with these options, and waits until it listens.
    pub fn start(options: &[&str]) -> Torture {
        let dir = tempfile::tempdir().unwrap();
        let output = NamedTempFile::new().unwrap();
        let printed = output.reopen().unwrap();
        let process = Command::new(crate::built::hotslot_backend())
            .args(["torture", "--socket"])
            .arg(dir.path().join("socket"))
            .args(options)
            .stdin(Stdio::null())
            .stdout(printed.try_clone().unwrap())
            .stderr(printed)
            .spawn()
            .unwrap();
        let torture = Torture { dir, process, output };
        torture.wait_for("listening");
        torture
    }

    /// One that does these things, and ends with its front-end. It is patient: tests run on busy machines.
    pub fn doing(steps: &[&str]) -> Torture {
        let steps = steps.iter().flat_map(|step| ["--do", step]);
        Torture::start(&["--once", "--patience", "30"].into_iter().chain(steps).collect::<Vec<_>>())
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// The device string for hotslot.
    pub fn device(&self, name: &str) -> String {
        format!("{},type=rng,name={name}", self.socket().display())
    }

    /// What it printed so far, on stdout and stderr.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.output.path()).unwrap()
    }

    /// Waits until it has printed `text`.
    pub fn wait_for(&self, text: &str) {
        let start = Instant::now();
        while !self.output().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no '{text}' in:\n{}", self.output());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGKILL, from outside.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Waits for its end; gives its status and what it printed.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (status, self.output());
            }
            assert!(start.elapsed() < PATIENCE, "it does not end:\n{}", self.output());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Torture {
    fn drop(&mut self) {
        // It has ended already in most tests.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
