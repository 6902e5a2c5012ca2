//! Sessions: a shell script (`tests/linux/host/`) that runs some guests on a host with KVM, and what came of
//! them.
//!
//! The host is this machine where its KVM can boot Linux, and an emulated one (`scripts/lab.sh`) elsewhere.
//! To start that takes as long as a guest does: so one session runs several guests, and several tests look at
//! one session.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Condvar, LazyLock, Mutex};

pub const PROJECT: &str = env!("CARGO_MANIFEST_DIR");
pub const HOTSLOT: &str = env!("CARGO_BIN_EXE_hotslot");
const BACKEND: &str = env!("CARGO_BIN_EXE_hotslot-backend");

/// How long the endurance test takes; by default it is short.
pub const ENDURANCE: &str = "HOTSLOT_ENDURANCE_SECONDS";

/// How often the same machine boots; by default a few times.
pub const BOOTS: &str = "HOTSLOT_ENDURANCE_BOOTS";

/// How many MiB the file has that is read through a small window; by default few.
pub const FS_FILE_MIB: &str = "HOTSLOT_FS_FILE_MIB";

/// How many requests a guest makes of each device whose exits are counted; by default few.
pub const REQUESTS: &str = "HOTSLOT_REQUESTS";

/// Where sessions leave their files.
const FILES: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/linux");

/// What the guests need of the stock kernel's modules.
const MODULES: [&str; 7] =
    ["virtio_mmio", "virtio_pmem", "nd_pmem", "virtio_blk", "virtio_rng", "pvpanic-mmio", "overlay"];

/// Each emulated host keeps one processor busy, and takes gigabytes.
const SESSIONS_AT_A_TIME: u32 = 2;

/// A time limit ends what hangs. Each is a few times what an idle machine needs, times this for a busy one.
const BUSY: u32 = 4;

/// Where guests run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kvm,
    Lab,
}

/// What every session uses.
struct House {
    kind: Kind,
    /// The directory with bzImage and vmlinux.
    kernel: PathBuf,
    /// The initramfs of all guests.
    image: PathBuf,
    /// The program of `guest/`, for its probes: some look from the host's side.
    init: PathBuf,
}

static HOUSE: LazyLock<House> = LazyLock::new(|| {
    let kind = match stdout("bash", &["-c", ". scripts/lib.sh; host_kind"]).as_str() {
        "kvm" => Kind::Kvm,
        "lab" => Kind::Lab,
        other => panic!("host_kind says {other:?}"),
    };
    let kernel = PathBuf::from(stdout("scripts/kernel.sh", &[]));
    fs::create_dir_all(FILES).unwrap();
    let image = Path::new(FILES).join("guest.cpio");
    let scripts = format!("{PROJECT}/tests/linux/guest:/test");
    let mut arguments = vec!["-o", image.to_str().unwrap(), "--file", &scripts];
    arguments.extend(MODULES.iter().flat_map(|module| ["--module", module]));
    stdout("scripts/image.sh", &arguments);
    let init = PathBuf::from(stdout("bash", &["-c", ". scripts/lib.sh; guest_init"]));
    House { kind, kernel, image, init }
});

/// Whether guests run on an emulated host.
pub fn is_emulated() -> bool {
    HOUSE.kind == Kind::Lab
}

/// The program of another of the project's tests, built as this one is: what needs no Linux runs on a host
/// with KVM, too.
pub fn test_program(name: &str) -> PathBuf {
    let mut arguments = vec!["test", "--no-run", "--locked", "--message-format=json", "--test", name];
    if !cfg!(debug_assertions) {
        arguments.push("--release");
    }
    let messages = stdout(env!("CARGO"), &arguments);
    // A message a line; what the test needs (hotslot itself) is among them.
    let path = messages
        .lines()
        .filter(|line| line.contains(r#""kind":["test"]"#))
        .find_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
    PathBuf::from(path.unwrap_or_else(|| panic!("cargo built no {name}:\n{messages}")))
}

/// A program that is installed, of this package of Debian's.
pub fn installed_program(name: &str, package: &str) -> PathBuf {
    let find = format!(
        "command -v {name} || {{ echo missing: {name}, of Debian\\'s package {package} >&2; exit 1; }}"
    );
    PathBuf::from(stdout("sh", &["-c", &find]))
}

/// Runs a command of the project's and gives what it printed, without the last newline.
pub fn stdout(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(PROJECT)
        .env_remove("KERNEL")
        .env_remove("MODULES")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", output.status);
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// Runs something that needs a host, not more of them at a time than this machine can bear.
pub fn in_turn<T>(run: impl FnOnce() -> T) -> T {
    static RUNNING: Mutex<u32> = Mutex::new(0);
    static ENDED: Condvar = Condvar::new();
    let mut running = RUNNING.lock().unwrap();
    while *running >= SESSIONS_AT_A_TIME {
        running = ENDED.wait(running).unwrap();
    }
    *running += 1;
    drop(running);
    let result = run();
    *RUNNING.lock().unwrap() -= 1;
    ENDED.notify_one();
    result
}

/// How one guest ended.
pub struct Guest {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl Guest {
    /// What follows `key` and a colon on each line that begins so.
    pub fn said<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.out.lines().filter_map(move |line| {
            let value = line.trim_end().strip_prefix(key)?.strip_prefix(": ")?;
            Some(value)
        })
    }

    /// The only such value.
    pub fn one<'a>(&'a self, key: &'a str) -> &'a str {
        let mut all = self.said(key);
        match (all.next(), all.next()) {
            (Some(value), None) => value,
            (value, _) => panic!("'{key}:' {}:\n{self}", value.map_or("is missing", |_| "comes twice")),
        }
    }

    /// Asserts how the machine ended: the status, and how the last line on stderr begins.
    pub fn ended(&self, status: i32, reason: &str) {
        let last = self.err.lines().last().unwrap_or_default();
        assert_eq!(self.status, status, "{self}");
        assert!(last.starts_with(&format!("hotslot: {reason}")), "{self}");
    }
}

impl std::fmt::Display for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Guest { status, out, err } = self;
        write!(f, "status {status}\nstdout:\n{out}\nstderr:\n{err}")
    }
}

/// A session that has ended.
pub struct Session {
    /// What it wrote. It stays until the next run, to be looked at.
    out: PathBuf,
    /// What the session's script and the host itself said.
    said: String,
}

impl Session {
    /// Runs `tests/linux/host/NAME.sh`, with these files in its directory `OUT`. `memory` is what the guests
    /// and the files need on an emulated host, `seconds` its time limit on an idle machine.
    pub fn run(name: &str, memory: &str, seconds: u32, files: &[(&str, Vec<u8>)]) -> Session {
        Session::with_programs(name, memory, seconds, files, &[])
    }

    /// With more programs, each in the environment variable of that name.
    pub fn with_programs(
        name: &str,
        memory: &str,
        seconds: u32,
        files: &[(&str, Vec<u8>)],
        programs: &[(&'static str, PathBuf)],
    ) -> Session {
        let house = &*HOUSE;
        let out = Path::new(FILES).join(name);
        let _nothing_was_there = fs::remove_dir_all(&out);
        fs::create_dir(&out).unwrap();
        for (file, bytes) in files {
            fs::write(out.join(file), bytes).unwrap();
        }

        let output = in_turn(|| house.run(name, memory, seconds, &out, programs));
        let said = [output.stdout, output.stderr].concat();
        Session { out, said: format!("{}\n{}", output.status, String::from_utf8_lossy(&said)) }
    }

    /// A guest of the session.
    pub fn guest(&self, name: &str) -> Guest {
        let status = self.text(&format!("{name}.status"));
        Guest {
            status: status.trim().parse().unwrap(),
            out: self.text(&format!("{name}.out")),
            err: self.text(&format!("{name}.err")),
        }
    }

    /// What the session's script found on its own side, as if a guest had said it.
    pub fn host(&self) -> Guest {
        Guest { status: 0, out: self.text("host.out"), err: self.said.clone() }
    }

    /// A file that the session wrote.
    pub fn file(&self, name: &str) -> Vec<u8> {
        let path = self.out.join(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}; the session said:\n{}", self.said))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&self.file(name)).into_owned()
    }
}

impl House {
    fn run(
        &self,
        name: &str,
        memory: &str,
        seconds: u32,
        out: &Path,
        programs: &[(&'static str, PathBuf)],
    ) -> Output {
        let seconds = (seconds * BUSY).to_string();
        // Past the test harness, which keeps what a test prints: the user sees it at once.
        let place = match self.kind {
            Kind::Kvm => "this machine's KVM",
            Kind::Lab => "an emulated host (scripts/lab.sh)",
        };
        let _nobody_listens =
            writeln!(std::io::stderr(), "guests of tests/linux/host/{name}.sh run on {place}");

        let scripts = format!("{PROJECT}/tests/linux/host");
        let script = format!("{scripts}/{name}.sh");
        let (bzimage, vmlinux) = (self.kernel.join("bzImage"), self.kernel.join("vmlinux"));
        let mut variables = vec![
            ("BZIMAGE", bzimage.clone()),
            ("VMLINUX", vmlinux.clone()),
            ("IMAGE", self.image.clone()),
            ("OUT", out.to_owned()),
            ("INPUT", out.join("input")),
            ("BUSY", BUSY.to_string().into()),
        ];
        let own = [("HOTSLOT", HOTSLOT.into()), ("BACKEND", BACKEND.into()), ("INIT", self.init.clone())];
        let programs = [&own, programs].concat();
        variables.extend_from_slice(&programs);
        for name in [ENDURANCE, BOOTS, FS_FILE_MIB, REQUESTS] {
            variables.extend(std::env::var_os(name).map(|value| (name, value.into())));
        }
        let mut command = match self.kind {
            Kind::Kvm => {
                let mut command = Command::new("timeout");
                command.args(["-k", "5", &seconds]);
                command
            }
            Kind::Lab => {
                variables.push(("LAB", "1".into()));
                let mut command = Command::new(format!("{PROJECT}/scripts/lab.sh"));
                command.args(["--memory", memory, "--timeout", &seconds]);
                for (_, program) in &programs {
                    command.arg("--exec").arg(program);
                }
                for file in [out, &self.image, Path::new(&scripts), &bzimage, &vmlinux] {
                    command.arg("--file").arg(file);
                }
                for (name, value) in &variables {
                    command.args(["--env", &format!("{name}={}", value.display())]);
                }
                command.arg("--out").arg(out).arg("--");
                command
            }
        };
        command
            .args(["/bin/sh", &script])
            .envs(variables)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}
