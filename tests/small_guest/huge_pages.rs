//! Huge pages of a file are huge pages of the guest, too: KVM maps each with one entry.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::built::hotslot;
use hotslot_test_support::files::{MIB, PAGE, memfd, memfd_with};
use hotslot_test_support::guest::{self, Guest};
use hotslot_test_support::huge_pages::{HugePages, NoHugePages};
use hotslot_test_support::kvm;
use hotslot_test_support::wire::{MMap, page_at, writable};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

const HUGE: u64 = 2 * MIB;
const GIB: u64 = 1 << 30;

/// Makes huge pages of a memfd's small ones. Whether the kernel can.
fn collapse(file: &File, len: u64) -> bool {
    let (len, huge) = (len as usize, HUGE as usize);
    let (flags, protection) = (MapFlags::PRIVATE, ProtFlags::READ | ProtFlags::WRITE);
    // SAFETY: the kernel chooses unused addresses.
    let room = unsafe { mmap_anonymous(std::ptr::null_mut(), len + huge, protection, flags) }.unwrap();
    let at = room.wrapping_byte_add(room.align_offset(huge));
    // SAFETY: the range is inside the room, which is this function's and which nothing refers to.
    unsafe { mmap(at, len, protection, MapFlags::SHARED | MapFlags::FIXED, file, 0) }.unwrap();
    // SAFETY: as above.
    let collapsed = unsafe { libc::madvise(at, len, libc::MADV_COLLAPSE) } == 0;
    // SAFETY: as above.
    unsafe { munmap(room, len + huge) }.unwrap();
    collapsed
}

/// Maps a file of `len` bytes with pages of `page` bytes, and touches each of them from the guest: how many
/// entries of `counter` KVM made. `None` where KVM does not count.
fn entries(file: &File, len: u64, page: u64, counter: &str) -> Option<u64> {
    let backend = Backend::offering(Offer { regions: vec![(0, len)], ..Offer::default() });
    let mut guest = Guest::with(&backend);
    let (region, _) = guest.region(0);
    assert_eq!(backend.map(writable(MMap { len, ..page_at(0) }), file), 0);
    let before = kvm::statistic(guest.pid(), counter);
    for at in (0..len).step_by(page as usize) {
        guest.write64(region + at, at);
        assert_eq!(guest.read64(region + at + page - PAGE), if page == PAGE { at } else { 0 });
    }
    let made = kvm::statistic(guest.pid(), counter).zip(before).map(|(after, before)| after - before);
    guest.exit();
    made
}

#[test]
fn huge_pages_of_a_file_are_huge_pages_of_the_guest() {
    // SHM-36
    if !kvm::is_here() {
        return;
    }
    let mut said = String::new();
    let small = memfd(2 * HUGE);
    if let Some(made) = entries(&small, 2 * HUGE, HUGE, "pages_2m") {
        assert_eq!(made, 0, "small pages");
    }
    if collapse(&small, 2 * HUGE)
        && let Some(made) = entries(&small, 2 * HUGE, HUGE, "pages_2m")
    {
        assert_eq!(made, 2);
        said += " transparent 2 MiB,";
    }
    for (size, flag, counter) in
        [(HUGE, MemfdFlags::HUGE_2MB, "pages_2m"), (GIB, MemfdFlags::HUGE_1GB, "pages_1g")]
    {
        let Some(_reserved) = HugePages::reserve(size, 1) else {
            continue;
        };
        let file = memfd_with(MemfdFlags::HUGETLB | flag, size);
        if let Some(made) = entries(&file, size, size, counter) {
            assert_eq!(made, 1, "{counter}");
            said += &format!(" reserved {} MiB,", size / MIB);
        }
    }
    println!("huge pages of the guest:{said}");
}

/// What smaps says of the guest's RAM under this name, in KiB.
fn of_ram(guest: &Guest, name: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", guest.pid())).unwrap();
    let mut lines = smaps.lines().skip_while(|line| !line.contains("memfd:guest-ram"));
    let line = lines.find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_matches(|other: char| !other.is_ascii_digit()).parse().unwrap()
}

#[test]
fn ram_is_in_the_huge_pages_that_were_asked_for() {
    const KIB: u64 = 64 << 10;
    if !kvm::is_here() {
        return;
    }
    let boot = |mode| {
        let mut guest = Guest::boot(["--hugepages", mode]);
        // The second is in the last huge page.
        for address in [16 * MIB, 62 * MIB] {
            guest.write64(address, address);
            assert_eq!(guest.read64(address), address, "{mode}");
        }
        guest
    };
    let huge = |mode| {
        let guest = boot(mode);
        let huge = of_ram(&guest, "ShmemPmdMapped:");
        guest.exit();
        huge
    };
    let small = memfd(HUGE);
    small.write_at(&[1], 0).unwrap();
    if collapse(&small, HUGE) {
        let [off, kernel, all] = ["off", "kernel", "all"].map(huge);
        assert_eq!((off, all), (0, KIB));
        assert!((2 << 10..=4 << 10).contains(&kernel), "{kernel} KiB for the monitor");
        let kernel = guest::kernel();
        let mut command = Command::new(hotslot());
        command.args(["-v", "-m", "65M", "--hugepages", "all", "--debug-exit", "-k"]).arg(kernel.path());
        let said = Guest::spawn(command, Some(kernel)).exit();
        assert!(said.contains("no huge page for guest memory at 0x4000000-0x40fffff: too short"), "{said}");
    } else {
        eprintln!("skipped: this host has no huge pages for a memfd");
    }
    let Some(_reserved) = HugePages::reserve(HUGE, 32) else {
        eprintln!("skipped: this machine has no huge pages to reserve");
        return;
    };
    let guest = boot("hugetlb");
    assert_eq!(of_ram(&guest, "KernelPageSize:"), 2 << 10);
    let refused =
        Command::new(hotslot()).args(["-m", "1G", "--hugepages", "hugetlb", "-k", "none"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("1073741824 bytes of guest memory are 512 huge pages"), "{said}");
    guest.exit();
}

#[test]
fn huge_pages_that_a_cgroup_refuses_are_an_error_at_the_start() {
    let (Some(_reserved), Some(cgroup)) = (HugePages::reserve(HUGE, 2), NoHugePages::new()) else {
        eprintln!("skipped: this machine has no huge pages to reserve, or no cgroup to limit them");
        return;
    };
    let refused = Command::new("sh")
        .args(["-c", "echo 0 > \"$1\" && exec \"$0\" -m 4M --hugepages hugetlb -k none"])
        .args([hotslot(), cgroup.processes()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("the host does not give 2 huge pages for 4194304 bytes"), "{said}");
    assert!(said.contains("hint: ") && said.contains("hugetlb.2MB.max"), "{said}");
}
