//! A rule of a seccomp filter: a system call, the arguments that it may have, and why a thread needs it.
//!
//! Tables of rules are in `every_thread`, `vmm` and the back-ends; [`super::confine`] makes filters of them.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use syscalls::Sysno;

/// A call that a thread may make. More than one rule for a call: either will do.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The call.
    pub call: Sysno,
    /// What one of its arguments must be; `None` for any arguments.
    pub only: Option<Argument>,
    /// Why a thread needs it. Readers of the tables see it; nothing prints it.
    pub why: &'static str,
}

/// What an argument must be. Arguments are counted from 0. The filter compares the lower 32 bits of a
/// register: the kernel uses no more of these arguments.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// This number.
    Is(u8, u32),
    /// Of these bits (the first number) those of the second are set and no others.
    Bits(u8, u32, u32),
    /// The id of this process.
    OwnProcess(u8),
}

/// A call with any arguments.
pub const fn call(call: Sysno, why: &'static str) -> Rule {
    Rule { call, only: None, why }
}

/// A call with a certain argument.
pub const fn call_if(call: Sysno, only: Argument, why: &'static str) -> Rule {
    Rule { call, only: Some(only), why }
}

/// A call on this process only: its id is the first argument.
pub const fn on_self(call: Sysno, why: &'static str) -> Rule {
    call_if(call, Argument::OwnProcess(0), why)
}

/// An ioctl, by its number.
pub const fn ioctl(number: u32, why: &'static str) -> Rule {
    call_if(Sysno::ioctl, Argument::Is(1, number), why)
}

/// An operation of fcntl.
pub const fn fcntl(operation: i32, why: &'static str) -> Rule {
    call_if(Sysno::fcntl, Argument::Is(1, operation as u32), why)
}

/// An operation of prctl.
pub const fn prctl(operation: i32, why: &'static str) -> Rule {
    call_if(Sysno::prctl, Argument::Is(0, operation as u32), why)
}

/// A call whose third argument is a protection of memory, as long as that memory cannot be executed.
pub const fn without_exec(call: Sysno, why: &'static str) -> Rule {
    call_if(call, Argument::Bits(2, libc::PROT_EXEC as u32, 0), why)
}

/// A filter that lets the calls of these rules through, of the process with this id.
pub(super) fn only<'a>(
    rules: impl Iterator<Item = &'a Rule>,
    refuse: SeccompAction,
    process: u32,
) -> Result<BpfProgram, BackendError> {
    let mut by_call: BTreeMap<i64, Vec<Option<Argument>>> = BTreeMap::new();
    for rule in rules {
        by_call.entry(rule.call.id().into()).or_default().push(rule.only);
    }
    let mut calls = BTreeMap::new();
    for (call, arguments) in by_call {
        // `None` where any of the rules allows all arguments; an empty list means that to the crate.
        let arguments: Option<Vec<Argument>> = arguments.into_iter().collect();
        let conditions =
            arguments.unwrap_or_default().into_iter().map(|argument| condition(argument, process));
        let rules: Result<Vec<_>, _> = conditions.map(|one| SeccompRule::new(vec![one?])).collect();
        calls.insert(call, rules?);
    }
    SeccompFilter::new(calls, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn condition(argument: Argument, process: u32) -> Result<SeccompCondition, BackendError> {
    let (index, operator, value) = match argument {
        Argument::Is(index, value) => (index, SeccompCmpOp::Eq, value),
        Argument::Bits(index, mask, value) => (index, SeccompCmpOp::MaskedEq(mask.into()), value),
        Argument::OwnProcess(index) => (index, SeccompCmpOp::Eq, process),
    };
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value.into())
}

/// A second filter: the kernel knows no clone3(2). Its flags are in memory, where no filter can look, so the
/// C library is to use clone(2) instead.
pub(super) fn without_clone3() -> Result<BpfProgram, BackendError> {
    let clone3 = BTreeMap::from([(Sysno::clone3.id().into(), vec![])]);
    let answer = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(clone3, SeccompAction::Allow, answer, TargetArch::x86_64)?.try_into()
}
