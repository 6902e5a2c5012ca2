//! The thread `gdb`: serves one gdb after another, by its remote protocol (the crate `gdbstub`).
//!
//! `Vmm::build` makes the socket, before there is a sandbox. The guest waits before its first instruction
//! until a gdb has connected and lets it run. While the guest is stopped, this thread waits for gdb without a
//! limit; nothing waits for this thread. When gdb detaches or hangs up, its breakpoints are removed and the
//! guest goes on. `kill` in gdb ends the machine.
//!
//! | file | what it does |
//! |---|---|
//! | `socket` | the listening socket, and the bytes of a connection |
//! | `target` | the machine as `gdbstub` sees it, and which event is a reason to stop |
//! | `breakpoints` | breakpoints and watchpoints, as `struct kvm_guest_debug` |
//! | `registers` | gdb's registers from and to KVM's |

mod breakpoints;
mod registers;
mod socket;
mod target;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SocketFlags, accept_with};

use super::error::{VmmError, failed_to};
use super::exit_once::ExitOnce;
use crate::config::GdbAddress;
use crate::exit::Exit;
use crate::kvm::vcpu::{Machine, Vcpu};
use crate::report::{say, with_causes};
use crate::sandbox::vmm::Kind;
use crate::thread;

use socket::{Client, Input};
use target::{Debuggee, Reason};

/// Where gdb connects.
pub(super) struct Gdb {
    listener: OwnedFd,
    /// The argument of gdb's `target remote`.
    name: String,
    step: u32,
}

impl Gdb {
    /// Makes the socket. `step` is how KVM runs a vCPU for one instruction.
    pub fn listen(address: &GdbAddress, step: u32) -> Result<Gdb, VmmError> {
        let (listener, name) = match address {
            GdbAddress::Port(port) => (socket::tcp(*port), format!("127.0.0.1:{port}")),
            GdbAddress::Unix(path) => (socket::unix(path), path.display().to_string()),
        };
        let listener = listener.map_err(|error| VmmError::Gdb(name.clone(), error))?;
        Ok(Gdb { listener, name, step })
    }

    /// Starts the thread.
    pub fn start(
        self,
        machine: &Arc<Machine>,
        vcpus: &Arc<Vec<Vcpu>>,
        exit: &Arc<ExitOnce>,
    ) -> Result<(), VmmError> {
        let Gdb { listener, name, step } = self;
        say(format_args!("hotslot: the guest waits for gdb: gdb -ex 'target remote {name}'"));
        let debuggee = Debuggee::new(Arc::clone(machine), Arc::clone(vcpus), step);
        let server = Server { exit: Arc::clone(exit), debuggee };
        thread::spawn("gdb".into(), Kind::Debugger, || server.run(listener))
            .map_err(failed_to("start the thread for gdb"))?;
        Ok(())
    }
}

struct Server {
    exit: Arc<ExitOnce>,
    debuggee: Debuggee,
}

/// Why a wait of this thread is over.
enum Wake {
    /// gdb has connected, sent something or hung up.
    Input,
    /// The guest stopped; all vCPUs are paused.
    Stop(Reason),
    /// The machine ends, with this status.
    End(u8),
}

/// Why a gdb is served no longer.
enum SessionEnd {
    Detached,
    HungUp,
    Killed,
    MachineEnds,
}

impl Server {
    fn run(mut self, listener: OwnedFd) {
        loop {
            match self.wait(listener.as_fd(), true) {
                Wake::End(_) => return,
                // A breakpoint of the previous gdb.
                Wake::Stop(_) => self.debuggee.reset(),
                Wake::Input => match accept_with(&listener, SocketFlags::CLOEXEC) {
                    Ok(connection) => self.serve(connection.into()),
                    Err(error) => log::warn!("gdb cannot connect: {error}"),
                },
            }
        }
    }

    /// Serves a gdb until it detaches or hangs up, or the machine ends.
    fn serve(&mut self, connection: File) {
        log::info!("gdb has connected: the guest stops");
        self.debuggee.stop();
        match self.talk(Arc::new(connection)) {
            Ok(SessionEnd::MachineEnds) => return,
            Ok(SessionEnd::Killed) => self.exit.set((&Exit::Killed).into()),
            Ok(SessionEnd::Detached) => log::info!("gdb has detached: the guest goes on"),
            Ok(SessionEnd::HungUp) => log::info!("gdb has hung up: the guest goes on"),
            Err(error) => log::warn!("gdb is gone: the guest goes on: {}", with_causes(&error)),
        }
        self.debuggee.reset();
    }

    fn talk(&mut self, connection: Arc<File>) -> Result<SessionEnd, GdbStubError<Infallible, io::Error>> {
        let mut input = Input::new(Arc::clone(&connection));
        let mut stub =
            GdbStub::new(Client::new(Arc::clone(&connection))).run_state_machine(&mut self.debuggee)?;
        loop {
            let does_run = matches!(stub, GdbStubStateMachine::Running(_));
            let wake = if input.is_empty() { self.wait(connection.as_fd(), does_run) } else { Wake::Input };
            let debuggee = &mut self.debuggee;
            stub = match (stub, wake) {
                (GdbStubStateMachine::Running(stub), Wake::Stop(reason)) => {
                    stub.report_stop(debuggee, reason)?
                }
                (GdbStubStateMachine::Running(stub), Wake::End(status)) => {
                    stub.report_stop(debuggee, Reason::Exited(status))?
                }
                (_, Wake::End(_)) => return Ok(SessionEnd::MachineEnds),
                (stub, _) => {
                    let Some(byte) = input.next() else { return Ok(SessionEnd::HungUp) };
                    match stub {
                        GdbStubStateMachine::Idle(stub) => stub.incoming_data(debuggee, byte)?,
                        GdbStubStateMachine::Running(stub) => stub.incoming_data(debuggee, byte)?,
                        stub => stub,
                    }
                }
            };
            stub = match stub {
                GdbStubStateMachine::CtrlCInterrupt(stub) => {
                    self.debuggee.stop();
                    let reason = self.debuggee.interrupted();
                    stub.interrupt_handled(&mut self.debuggee, Some(reason))?
                }
                GdbStubStateMachine::Disconnected(stub) => {
                    return Ok(match stub.get_reason() {
                        DisconnectReason::Disconnect => SessionEnd::Detached,
                        DisconnectReason::Kill => SessionEnd::Killed,
                        DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_) => {
                            SessionEnd::MachineEnds
                        }
                    });
                }
                stub => stub,
            };
        }
    }

    fn wait(&mut self, source: BorrowedFd<'_>, does_run: bool) -> Wake {
        loop {
            if let Some(ending) = self.exit.get() {
                return Wake::End(ending.status);
            }
            if does_run && let Some(reason) = self.debuggee.next_stop() {
                return Wake::Stop(reason);
            }
            // While the guest is stopped, its events stay queued.
            let event = self.debuggee.event().filter(|_| does_run);
            let sources = [Some(source), Some(self.exit.event()), event];
            let mut polled: Vec<_> =
                sources.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
            // It fails only with EINTR.
            let _ = poll(&mut polled, None);
            if !polled[0].revents().is_empty() {
                return Wake::Input;
            }
        }
    }
}
