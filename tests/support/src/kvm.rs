//! Whether tests that need `/dev/kvm` can run.

use std::fs::OpenOptions;
use std::io::{Write, stderr};
use std::sync::OnceLock;

/// Whether the processor can virtualise: then KVM is as the kernel has it, and not one made of software.
pub fn is_hardware() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    flags.split_whitespace().any(|flag| ["vmx", "svm"].contains(&flag))
}

/// One of KVM's own statistics of the machine of process `pid`; `None` where KVM does not count it, or this
/// process may not read it (debugfs).
pub fn statistic(pid: i32, name: &str) -> Option<u64> {
    let machines = std::fs::read_dir("/sys/kernel/debug/kvm").ok()?;
    let prefix = format!("{pid}-");
    let machine =
        machines.flatten().find(|machine| machine.file_name().to_string_lossy().starts_with(&prefix))?;
    std::fs::read_to_string(machine.path().join(name)).ok()?.trim().parse().ok()
}

/// True if the calling test can run. Says once which KVM there is; where there is none, says so for each
/// test, and REQUIRE_KVM=1 makes that a failure.
#[must_use]
pub fn is_here() -> bool {
    static KVM: OnceLock<Result<&str, String>> = OnceLock::new();
    // Not `eprintln!`: the test harness would keep it to itself.
    let say = |text: String| drop(writeln!(stderr(), "{text}"));
    let kvm = KVM.get_or_init(|| {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        kvm.map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let kind = match flags.split_whitespace().find(|flag| ["vmx", "svm"].contains(flag)) {
            Some(_) => "with hardware virtualisation",
            None => "without vmx and svm: software",
        };
        say(format!("KVM: {kind}"));
        Ok(kind)
    });
    let Err(why) = kvm else { return true };
    let test = std::thread::current().name().unwrap_or("a test").to_string();
    assert!(std::env::var_os("REQUIRE_KVM").is_none_or(|value| value != "1"), "REQUIRE_KVM=1, and {why}");
    say(format!("SKIPPED: {test}: {why}"));
    false
}
