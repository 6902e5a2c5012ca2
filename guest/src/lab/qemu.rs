//! QEMU, and the back-ends of the directories that the emulated host shares with this machine: started with
//! the settings that were found to work, ended with the value that holds them.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

use super::link::share_tag;
use super::options::Options;
use super::signals::unblock_in;
use crate::outcome::{Outcome, failed};

/// How long a back-end may take until it listens.
const BACKEND_TIME: Duration = Duration::from_secs(10);

/// A running QEMU with its back-ends. They end when this value is dropped, or when this process does.
pub struct Qemu {
    // In this order: a back-end ends last, so that QEMU never loses one.
    qemu: Stopped,
    _backends: Vec<Stopped>,
}

/// Starts QEMU with its link, its log and perhaps its monitor on these sockets.
pub fn start(
    options: &Options,
    link: UnixStream,
    log: UnixStream,
    monitor: Option<UnixStream>,
) -> Outcome<Qemu> {
    let initramfs = put_together(&options.initramfs)?;
    let (mut backends, mut shares) = (Vec::new(), Vec::new());
    for directory in &options.start.shares {
        let directory = Path::new(OsStr::from_bytes(directory));
        let (backend, socket) = start_backend(&options.backend, directory, &log)?;
        backends.push(backend);
        shares.push(socket);
    }
    let qemu = start_qemu(options, initramfs, link, log, monitor, shares)?;
    Ok(Qemu { qemu, _backends: backends })
}

impl Qemu {
    /// Ends QEMU, so that its log has an end.
    pub fn stop(&mut self) {
        self.qemu.stop();
    }
}

/// The initramfs archives one behind the other, as the kernel accepts them, in a memfd.
fn put_together(parts: &[PathBuf]) -> Outcome<File> {
    let memfd = rustix::fs::memfd_create("initramfs", MemfdFlags::CLOEXEC);
    let mut whole = File::from(memfd.map_err(|error| format!("cannot create a memfd: {error}"))?);
    for part in parts {
        let mut file = File::open(part).map_err(failed("copy", part))?;
        let length = io::copy(&mut file, &mut whole).map_err(failed("copy", part))?;
        // An archive begins at a multiple of four.
        let padding = [0; 4];
        whole.write_all(&padding[..(length.wrapping_neg() % 4) as usize]).map_err(failed("copy", part))?;
    }
    Ok(whole)
}

/// Descriptors that a new process keeps, under the same numbers.
#[derive(Default)]
struct Inherited(Vec<OwnedFd>);

impl Inherited {
    /// The number of the descriptor, for the process's command line.
    fn add(&mut self, descriptor: impl Into<OwnedFd>) -> i32 {
        let descriptor = descriptor.into();
        let number = descriptor.as_raw_fd();
        self.0.push(descriptor);
        number
    }
}

fn copy(log: &UnixStream) -> Outcome<OwnedFd> {
    let copy = log.try_clone().map_err(|error| format!("cannot duplicate a socket: {error}"))?;
    Ok(copy.into())
}

fn start_qemu(
    options: &Options,
    initramfs: File,
    link: UnixStream,
    log: UnixStream,
    monitor: Option<UnixStream>,
    shares: Vec<UnixStream>,
) -> Outcome<Stopped> {
    let (messages, errors) = (copy(&log)?, copy(&log)?);
    let mut inherited = Inherited::default();
    let mut qemu = Command::new(&options.qemu);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        // Two processors lost a race in the kernel's code patching (threads) or hung in the nested guest (one
        // thread). Without XSAVE: the emulated SVM does not tell KVM of a guest's XSETBV. Without fast string
        // instructions: the kernel then clears and copies pages by eight bytes at a time, which the emulator
        // does six times as fast.
        .args(["-accel", "tcg,thread=single", "-cpu", "max,+svm,-xsave,-erms,-fsrm", "-smp", "1"])
        .args(["-M", "q35,vmport=off", "-m", &options.memory])
        .arg("-kernel")
        .arg(&options.kernel)
        .args(["-initrd", &format!("/proc/self/fd/{}", inherited.add(initramfs))])
        .arg("-append")
        .arg(kernel_command_line(&options.append)?)
        .args(["-chardev", &format!("socket,id=log,fd={}", inherited.add(log)), "-serial", "chardev:log"])
        .args(["-chardev", &format!("socket,id=link,fd={}", inherited.add(link))])
        .args(["-device", "virtio-serial-pci,max_ports=2"])
        .args(["-device", "virtserialport,chardev=link,name=lab"]);
    if let Some(monitor) = monitor {
        qemu.args(["-chardev", &format!("socket,id=monitor,fd={}", inherited.add(monitor))])
            .args(["-mon", "chardev=monitor"]);
    }
    if options.icount {
        // The clock counts instructions, and nothing of this machine's time reaches the emulated one.
        qemu.args(["-icount", "shift=0,sleep=off", "-seed", "1"])
            .args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
    }
    if !shares.is_empty() {
        // The back-ends read and write the emulated host's memory.
        let size = with_suffix(&options.memory);
        qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={size},share=on")])
            .args(["-machine", "memory-backend=memory"]);
    }
    for (number, share) in shares.into_iter().enumerate() {
        let (id, descriptor) = (share_tag(number), inherited.add(share));
        qemu.args(["-chardev", &format!("socket,id={id},fd={descriptor}")])
            .args(["-device", &format!("vhost-user-fs-pci,chardev={id},tag={id}")]);
    }
    qemu.stdin(Stdio::null()).stdout(messages).stderr(errors);
    spawn(qemu, inherited).map_err(failed("run", &options.qemu))
}

/// `-m` takes MiB, a memory back-end bytes, where there is no suffix.
fn with_suffix(memory: &str) -> String {
    let unit = if memory.bytes().all(|byte| byte.is_ascii_digit()) { "M" } else { "" };
    format!("{memory}{unit}")
}

/// Linux's COMMAND_LINE_SIZE for x86 without its last byte, a zero. It would cut the line off there.
const CMDLINE_MOST: usize = 2048 - 1;

/// The emulated host's kernel command line; `append` is the user's.
fn kernel_command_line(append: &OsStr) -> Outcome<OsString> {
    // no_timer_check: the check counts ticks in a time that the emulator cannot promise while others use the
    // processor, and a failed check is a panic.
    let mut line = OsString::from(
        "console=ttyS0 quiet reboot=t panic=-1 mitigations=off no_timer_check hotslot.link=lab hotslot.hold_vm ",
    );
    line.push(append);
    if line.len() > CMDLINE_MOST {
        let (len, own) = (append.len(), line.len() - append.len());
        return Err(format!(
            "--append: {len} bytes, and the kernel takes {CMDLINE_MOST}, of which {own} are the lab's"
        ));
    }
    Ok(line)
}

/// Serves one directory by virtio-fs: the back-end, and QEMU's connection to it.
///
/// Without a DAX window, which QEMU does not have.
fn start_backend(program: &Path, directory: &Path, log: &UnixStream) -> Outcome<(Stopped, UnixStream)> {
    let place = std::env::temp_dir().join(format!("hotslot-lab-{}", std::process::id()));
    fs::create_dir(&place).map_err(failed("make", &place))?;
    let socket = place.join("socket");
    let mut command = Command::new(program);
    command
        .arg("fs")
        .arg("--once")
        .args(["--window", "0"])
        .arg("--socket")
        .arg(&socket)
        .arg("--dir")
        .arg(directory);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(copy(log)?);
    let connected = spawn(command, Inherited::default())
        .map_err(failed("run", program))
        .and_then(|mut backend| Ok((connect(&mut backend, &socket)?, backend)));
    // A connection needs no name. When there is none, this is all that can be left.
    let _ = fs::remove_dir_all(&place);
    connected.map(|(stream, backend)| (backend, stream))
}

/// Connects as soon as the back-end listens.
fn connect(backend: &mut Stopped, socket: &Path) -> Outcome<UnixStream> {
    let end = Instant::now() + BACKEND_TIME;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > end => return Err(failed("connect to", socket)(error)),
            Err(_) => {}
        }
        if let Ok(Some(status)) = backend.0.try_wait() {
            return Err(format!("the back-end of a shared directory ended: {status}"));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Starts a process that keeps these descriptors and dies with this process.
fn spawn(mut command: Command, inherited: Inherited) -> io::Result<Stopped> {
    let parent = getpid();
    let prepare = move || {
        for descriptor in &inherited.0 {
            fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: between fork and exec, `prepare` makes only system calls on descriptors that it owns, and
    // allocates nothing.
    unsafe { command.pre_exec(prepare) };
    unblock_in(&mut command);
    // Ctrl-C is for this process to handle: the new one is not in the terminal's process group.
    command.process_group(0).spawn().map(Stopped)
}

/// A process that does not outlive this value.
struct Stopped(Child);

impl Stopped {
    fn stop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_would_cut_off_is_refused() {
        let own = kernel_command_line(OsStr::new("")).unwrap().len();
        for (len, is_fine) in [(CMDLINE_MOST - own, true), (CMDLINE_MOST - own + 1, false), (70_000, false)] {
            let line = kernel_command_line(OsStr::new(&"y".repeat(len)));
            assert_eq!(line.is_ok(), is_fine, "{line:?}");
        }
    }
}
