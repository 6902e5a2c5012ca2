//! `--memory-picture`: the picture of a machine that runs.

use std::fs;
use std::path::Path;

use hotslot_test_support::backend::Backend;
use hotslot_test_support::files::{MIB, PAGE, numbered_file};
use hotslot_test_support::full_disk::FullDisk;
use hotslot_test_support::guest::Guest;
use hotslot_test_support::wire::{MMap, page_at, writable};
use hotslot_test_support::{kvm, picture, wait};

fn guest(backend: &Backend, file: &Path) -> Guest {
    let options = ["--vhost-user", &backend.device("share"), "--memory-picture", file.to_str().unwrap()];
    let mut guest = Guest::boot(options);
    guest.start_device();
    guest
}

#[test]
fn sigusr1_and_the_end_draw_the_memory_with_live_mappings() {
    if !kvm::is_here() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("memory.svg");
    let backend = Backend::start();
    let mut guest = guest(&backend, &file);
    assert_eq!(fs::read(&file).unwrap(), b"");
    let (base, _) = guest.region(0);
    let payload = MMap { fd_offset: PAGE, ..page_at(3) };
    assert_eq!(backend.map(writable(payload), &numbered_file(1, 2)), 0);
    assert_eq!(backend.map(page_at(9), &numbered_file(2, 2)), 0);
    guest.wait_for_map("region 7");
    let drawn = || fs::read_to_string(&file).unwrap();
    wait::eventually("it is drawn", || drawn().ends_with("</svg>\n"));
    let first = drawn();
    let texts = picture::texts(&first);
    for text in [
        "RAM, 64 MiB",
        "registers of share, 4 KiB",
        "share shared memory region 0, 4 MiB",
        "share shared memory region 7, 2 MiB",
        "mapping at +0x3000, 4 KiB, read-write, file offset 0x1000",
        "mapping at +0x9000, 4 KiB, read-only, file offset 0x0",
        &format!("{:#014x}", base + 3 * PAGE),
    ] {
        assert!(texts.iter().any(|line| line.starts_with(text)), "no {text:?} in {texts:#?}");
    }
    // The end draws what is then mapped, and nothing is left of a longer picture.
    assert_eq!(backend.unmap(page_at(9)), 0);
    guest.exit();
    let last = drawn();
    assert!(last.len() < first.len());
    let texts = picture::texts(&last);
    assert_eq!(texts.iter().filter(|line| line.starts_with("mapping")).count(), 1, "{texts:#?}");
}

#[test]
fn a_picture_that_cannot_be_written_is_told_and_harms_nobody() {
    let Some(disk) = kvm::is_here().then(FullDisk::new).flatten() else {
        return;
    };
    disk.sparse_file(1, 1);
    let file = disk.path().join("memory.svg");
    let backend = Backend::start();
    let mut guest = guest(&backend, &file);
    guest.wait_for_map("region 7");
    guest.wait_for_log("hotslot: warn: cannot write the memory picture");
    guest.wait_for_log("No space left on device");
    assert_eq!(fs::read(&file).unwrap(), b"", "rather none than a part of one");
    guest.write64(32 * MIB, 5);
    assert_eq!(guest.read64(32 * MIB), 5);
    disk.make_room();
    guest.exit();
    picture::texts(&fs::read_to_string(&file).unwrap());
}
