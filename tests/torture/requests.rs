//! What a back-end may ask for: hotslot answers as specified throughout.

use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::torture::Torture;

/// What the pattern has at an offset.
pub const fn pattern(offset: u64) -> u64 {
    1 << 32 | offset
}

#[test]
fn every_request_is_carried_out_or_refused_as_specified() {
    // SHM-25, SHM-26, SHM-27, SHM-29, SHM-30, SHM-31, SHM-32, SHM-33, SHM-34, SHM-35, SHM-36, SHM-37, SHM-39,
    // SHM-41, SHM-42, SHM-44, SHM-47, SHM-49, SHM-51, SHM-52, SHM-53, SHM-54, SHM-55, SHM-57, SHM-58, SHM-59,
    // SHM-61, SHM-62, SHM-63, SHM-65
    if !kvm::is_here() {
        return;
    }
    let regions = ["--region", "0=4M", "--region", "7=2M"];
    let torture =
        Torture::start(&[&regions[..], &["--once", "--patience", "30", "--do", "everything"]].concat());
    let mut guest = Guest::boot(["--vhost-user", &torture.device("tortured")]);
    guest.start_device();
    torture.wait_for("everything: ");
    let (base, _) = guest.region(0);
    // Nothing but the pattern is left.
    assert_eq!(guest.read64(base + 0xf008), pattern(0xf008));
    assert_eq!(guest.read64(base + 0x10000), u64::MAX);
    assert_eq!(guest.have_filled(0x180_0000, 128), 128);
    guest.exit();
    let (status, output) = torture.wait();
    assert_eq!(status.code(), Some(0), "{output}");
    // What the specification leaves open is our policy.
    for (case, answers) in [
        ("unaligned-len", &["done", "done"][..]),
        ("zero-len", &["refused"]),
        ("unknown-flags", &["refused", "refused", "refused"]),
        ("padding", &["done", "done"]),
        ("past-end-of-file", &["done", "done"]),
        ("two-fds", &["refused"]),
        ("unmap-fd", &["done", "refused"]),
        ("unmap-other-fields", &["done", "done"]),
    ] {
        let lines = output.lines().filter(|line| line.starts_with(&format!("{case}: ")));
        let came: Vec<_> = lines
            .filter_map(|line| line.rsplit_once(": "))
            .map(|(_, came)| came.split(',').next().unwrap())
            .collect();
        let (_verdict, came) = came.split_last().unwrap();
        assert_eq!(came, answers, "{case}: {output}");
    }
    // Every other request has a verdict, and none because it could not be tried.
    assert_eq!(output.matches(": as specified\n").count(), 37, "{output}");
    assert!(output.contains("46 of 46 cases tried"), "{output}");
    assert!(!output.contains("keeps the descriptor"), "{output}");
}

/// Runs a back-end with these options, a device with these further keys, and reads the first word of region
/// 0.
fn first_word(options: &[&str], keys: &str, until: &str) -> (u64, String) {
    let (word, status, output) = first_word_and_status(options, keys, until);
    assert_eq!(status, Some(0), "{output}");
    (word, output)
}

fn first_word_and_status(options: &[&str], keys: &str, until: &str) -> (u64, Option<i32>, String) {
    let torture = Torture::start(&[&["--once", "--patience", "30"], options].concat());
    let device = format!("{}{keys}", torture.device("tortured"));
    let mut guest = Guest::boot(["--vhost-user", &device]);
    guest.start_device();
    torture.wait_for(until);
    let (base, _) = guest.region(0);
    assert_eq!(guest.have_filled(0x180_0000, 32), 32);
    let word = match base {
        u64::MAX => u64::MAX,
        base => guest.read64(base),
    };
    guest.exit();
    let (status, output) = torture.wait();
    (word, status.code(), output)
}

#[test]
fn what_was_not_negotiated_is_refused() {
    // SHM-6, SHM-21
    if !kvm::is_here() {
        return;
    }
    // All that is usual but SHMEM.
    let options = ["--protocol-features", "0x12629", "--do", "not-negotiated"];
    let (word, output) = first_word(&options, "", "not-negotiated: as specified");
    assert_eq!(word, u64::MAX, "{output}");
}

#[test]
fn without_reply_ack_requests_are_carried_out_and_not_answered() {
    // SHM-5, SHM-59
    if !kvm::is_here() {
        return;
    }
    // BACKEND_REQ and SHMEM, and nothing else.
    let options = ["--protocol-features", "0x400020", "--do", "map"];
    let (word, status, output) = first_word_and_status(&options, "", "map: no verdict");
    assert_eq!((word, status), (pattern(0), Some(1)), "{output}");
}

#[test]
fn drafts_have_another_bit() {
    // SHM-1
    if !kvm::is_here() {
        return;
    }
    for bit in ["20", "21"] {
        let keys = format!(",shmem-bit={bit}");
        let (word, output) = first_word(&["--shmem-bit", bit, "--do", "map"], &keys, "map: as specified");
        assert_eq!(word, pattern(0), "{output}");
    }
}
