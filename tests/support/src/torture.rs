//! A running `hotslot-backend torture`.

use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::built;
use crate::child::Running;

/// What it prints is what it does, on stdout, and why it ends, on stderr.
pub struct Torture {
    dir: TempDir,
    program: Running,
}

impl Torture {
    /// Starts it with these options, and waits until it listens.
    pub fn start(options: &[&str]) -> Torture {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(built::hotslot_backend());
        command.args(["torture", "--socket"]).arg(dir.path().join("socket")).args(options);
        let program = Running::start_with_stdout(command.stdin(Stdio::null()));
        program.wait_for("listening");
        Torture { dir, program }
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
}

impl Deref for Torture {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.program
    }
}
