//! A directory of the host in a guest, by virtio-fs with DAX: `hotslot-backend fs`, and with it
//! `hotslot-backend blk`.

use std::sync::LazyLock;

use crate::complains_of_nothing_else;
use crate::host::{self, Guest, Session};

static FS: LazyLock<Session> = LazyLock::new(|| Session::run("fs", "2G", 420, &[]));
static DIRECT: LazyLock<Session> =
    LazyLock::new(|| Session::run("fs_direct", "2G", 420, &[("ext4.img", crate::disk(None))]));
static LOCKS: LazyLock<Session> = LazyLock::new(|| Session::run("fs_locks", "2G", 300, &[]));
static RIGHTS: LazyLock<Session> = LazyLock::new(|| Session::run("fs_rights", "2G", 300, &[]));
static WINDOW: LazyLock<Session> = LazyLock::new(|| {
    let mib = file_mib();
    let programs = [("FIO", host::installed_program("fio", "fio"))];
    // The files are in that host's memory, which gives half of itself to files.
    let memory = format!("{}M", 2048 + 4 * mib);
    Session::with_programs("fs_window", &memory, 420 + mib as u32 * 3, &[], &programs)
});

/// The file that is read through a window of a twelfth of it.
fn file_mib() -> u64 {
    std::env::var(host::FS_FILE_MIB).map_or(192, |mib| mib.parse().unwrap())
}

const ENDED: &str = "the guest ended with status 0 (debug exit)";

/// What files are tried for.
const CHECKS: &str = "write append truncate rename unlink link symlink xattr flock fcntl mmap-shared mmap-private mmap-buffer fallocate sparse program";

/// What a line says up to a word.
fn up_to<'a>(line: &'a str, word: &str) -> &'a str {
    line.split(word).next().unwrap_or_default().trim_end()
}

#[test]
fn files_of_the_host_are_used_as_files() {
    let (guest, host) = (FS.guest("fs"), FS.host());
    guest.ended(0, ENDED);
    assert!(guest.out.contains(" virtiofs "), "{guest}");
    assert!(guest.out.contains("dax=always"), "{guest}");
    assert_eq!(guest.one("probe files"), CHECKS, "{guest}");
    assert_eq!(guest.one("run"), "out of the share");
    for (key, value) in [
        ("told", "From the guest."),
        ("append", "onetwothree"),
        ("names", "2"),
        ("target", "symlink.target"),
        ("attribute", "probe xattr: a value"),
        ("sparse", "67108864"),
    ] {
        assert_eq!(host.one(key), value, "{guest}{host}");
    }
    let holes: u64 = up_to(host.one("holes"), "KiB").parse().unwrap();
    assert!((4..=2048).contains(&holes), "{holes} KiB are not holes");
    complains_of_nothing_else(&guest);
}

#[test]
fn host_and_guest_see_what_the_other_does() {
    let (guest, host) = (FS.guest("fs"), FS.host());
    assert_eq!(guest.one("given"), "From the host, A.");
    assert_eq!(guest.one("changed"), "From the host, B.");
    assert_eq!(guest.one("made"), "new");
    // Both counted in one page, through mappings.
    assert_eq!(guest.one("probe turns"), "1000", "{guest}{host}");
    assert_eq!(host.one("probe turns"), "1000", "{guest}{host}");
}

/// The pages that `probe watch` found: with data, with zeroes, raising SIGBUS; once for each time it looked.
fn watched(guest: &Guest) -> Vec<[u64; 3]> {
    let numbers = |line: &str| {
        let mut words = line.split_whitespace().filter_map(|word| word.parse().ok());
        std::array::from_fn(|_| words.next().unwrap_or_else(|| panic!("{guest}")))
    };
    guest.said("watch").map(numbers).collect()
}

#[test]
fn a_file_that_is_cut_short_on_the_host_reads_as_zeroes_in_the_guest() {
    // SHM-45
    let guest = FS.guest("fs");
    guest.ended(0, ENDED);
    let [before, after] = watched(&guest)[..] else {
        panic!("{guest}");
    };
    assert_eq!(before, [256, 0, 0], "{guest}");
    // 16 KiB are left. The kernel may have noticed, and then raises SIGBUS.
    let [data, zeroes, bus] = after;
    assert_eq!((data, zeroes + bus), (4, 252), "{guest}");
}

#[test]
fn a_guest_remounts_and_its_driver_lets_go_and_comes_back() {
    // SHM-69, SHM-72
    let guest = FS.guest("fs");
    guest.ended(0, ENDED);
    assert_eq!(guest.one("again"), "From the host, B.");
    assert_eq!(guest.one("rebound"), "From the host, B.");
    assert!(!guest.out.contains("mounted without a driver"), "{guest}");
    assert!(guest.one("probe sum").contains("of 4194304 bytes"), "{guest}");
}

#[test]
fn what_is_mapped_outlives_the_back_end_and_the_next_machine_is_served() {
    // SHM-76
    let (guest, next) = (FS.guest("killed"), FS.guest("next"));
    guest.ended(0, "the guest switched itself off");
    let [before, after] = watched(&guest)[..] else {
        panic!("{guest}");
    };
    assert_eq!((before, after), ([1024, 0, 0], [1024, 0, 0]), "{guest}");
    assert_eq!(guest.one("alive"), "probe cpus: 1 ran");
    next.ended(0, ENDED);
    assert_eq!(next.one("given"), "From the host, B.");
    // What a machine before saw of the same file.
    let sum = |guest: &Guest| up_to(guest.one("probe sum"), " in ").to_owned();
    assert_eq!(sum(&next), sum(&FS.guest("fs")));
}

#[test]
fn a_guest_uses_more_files_than_its_back_end_holds() {
    let guest = FS.guest("next");
    guest.ended(0, ENDED);
    assert_eq!(guest.one("many"), "197 files, 3/5 3/4 3/6 3/1 3/2", "{guest}");
    assert_eq!(guest.one("left"), "0");
}

#[test]
fn a_file_is_read_through_a_window_that_is_far_smaller() {
    let (guest, host) = (WINDOW.guest("window"), WINDOW.host());
    guest.ended(0, ENDED);
    for how in ["cold", "again", "read"] {
        let sum = guest.one(how);
        assert_eq!(up_to(sum, " in "), up_to(host.one("big"), " in "), "{guest}");
        eprintln!("{how}: {sum}");
    }
    complains_of_nothing_else(&guest);
}

#[test]
fn what_is_written_through_a_small_window_is_what_the_host_reads() {
    let (guest, host) = (WINDOW.guest("window"), WINDOW.host());
    guest.ended(0, ENDED);
    for engine in ["mmap", "psync"] {
        assert!(guest.said(&format!("fio {engine} write")).count() == 1, "{guest}");
        let key = format!("verified {engine}");
        let verdict = host.one(&key);
        assert_eq!(verdict, "0", "{}", WINDOW.text(&format!("verify.{engine}")));
    }
}

#[test]
fn what_is_read_takes_none_of_the_guest_s_memory() {
    let guest = WINDOW.guest("window");
    let free = |when: &str| guest.one(when).parse::<u64>().unwrap();
    let (before, after) = (free("free before"), free("free after"));
    let file = file_mib() << 10;
    eprintln!("free memory of the guest: {before} KiB before, {after} KiB after {file} KiB of file");
    // The page structs of the window were taken at the start of the driver. What else the kernel keeps for a
    // while, of directories and files and ranges, is far from the size of the file.
    assert!(
        before.saturating_sub(after) < (file / 12 / 64).max(4 << 10),
        "{before} KiB, then {after} KiB\n{guest}"
    );
}

#[test]
fn two_guests_share_the_host_s_pages() {
    let host = WINDOW.host();
    let kib = |key: &str| host.one(key).parse::<u64>().unwrap();
    let file = 48 << 10;
    for guest in ["one", "two"] {
        WINDOW.guest(guest).ended(0, ENDED);
        let (rss, pss) = (kib(&format!("rss {guest}")), kib(&format!("pss {guest}")));
        let all = ["Rss", "Pss"].map(|what| kib(&format!("all {guest} {what}")));
        eprintln!("{guest}: of the share {rss} KiB resident, {pss} proportionally; of all {all:?}");
        // All of the file is there, and each guest has its half of it: to a tenth, as page tables are filled
        // ahead.
        assert!((file..file + file / 10).contains(&rss), "{host}");
        assert!(pss < rss / 2 + rss / 10, "{host}");
    }
}

#[test]
fn a_disk_reads_and_writes_what_another_device_mapped() {
    // SHM-80
    let (guest, host) = (DIRECT.guest("shared"), DIRECT.host());
    guest.ended(0, ENDED);
    let done: Vec<_> = guest.said("probe direct").collect();
    assert_eq!(done, ["6291456 bytes"; 2], "{guest}");
    let file = host.one("shared file");
    assert_eq!((host.one("shared disk"), host.one("shared back")), (file, file), "{guest}");
    // Another share, mounted without DAX, does.
    let done: Vec<_> = guest.said("probe other").collect();
    assert_eq!(done, ["6291456 bytes"; 2], "{guest}");
    assert_eq!((host.one("shared to"), host.one("shared again")), (file, file), "{guest}");
    both_devices_go_on(&guest, "shared.img");
    complains_of_nothing_else(&guest);
}

#[test]
fn without_sharing_it_is_an_io_error_and_both_devices_go_on() {
    let (guest, host) = (DIRECT.guest("alone"), DIRECT.host());
    guest.ended(0, ENDED);
    for what in ["write", "read"] {
        let error = format!("probe: cannot {what} /dev/vda: Input/output error (os error 5)");
        assert!(guest.out.lines().any(|line| line.trim_end() == error), "{guest}");
    }
    for what in ["write", "read"] {
        let error = format!("probe: cannot {what} /other/to: Bad address (os error 14)");
        assert!(guest.out.lines().any(|line| line.trim_end() == error), "{guest}");
    }
    assert_ne!(host.one("alone disk"), host.one("alone file"));
    both_devices_go_on(&guest, "alone.img");
}

#[test]
fn a_disk_of_two_queues_and_large_blocks_has_a_file_system() {
    let guest = DIRECT.guest("shared");
    guest.ended(0, ENDED);
    assert_eq!(guest.one("blocks"), "4096 4096 4096", "{guest}");
    assert_eq!(guest.one("queues"), "2", "{guest}");
    assert_eq!((guest.one("cache"), guest.one("then")), ("write back", "write through"), "{guest}");
    let sums: Vec<_> = guest.said("on disk").collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{guest}");
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), DIRECT.file("ext4.img")).unwrap();
    let path = image.path().to_str().unwrap();
    crate::tool("e2fsck", &["-f", "-n", path]);
    let [first, second] = ["0", "1"].map(|name| crate::file_in(image.path(), name));
    assert!(first == second && first.len() > 4 << 19, "{} and {} bytes", first.len(), second.len());
}

fn both_devices_go_on(guest: &Guest, image: &str) {
    assert_eq!((guest.one("size"), guest.one("serial")), ("32768", image));
    assert!(guest.one("share").ends_with("of 6291456 bytes"), "{guest}");
    let disk: Vec<_> = guest.said("disk").collect();
    assert_eq!(disk, ["written", "read"], "{guest}");
}

#[test]
fn modes_owners_and_attributes_are_as_on_the_host() {
    let (guest, host) = (RIGHTS.guest("rights"), RIGHTS.host());
    guest.ended(0, ENDED);
    let checks = "probe rights: set-id capability acl default-acl group flags made";
    for how in ["direct", "cached", "mapped"] {
        assert_eq!(guest.one(how), checks, "{guest}{host}");
    }
    assert_eq!(host.one("user"), "101000:100077");
    complains_of_nothing_else(&guest);
}

#[test]
fn overlayfs_has_its_upper_layer_on_a_share() {
    let (guest, host) = (RIGHTS.guest("rights"), RIGHTS.host());
    for share in ["/share", "/mapped"] {
        assert_eq!(guest.one(&format!("overlay {share}")), "/merged/again /merged/new", "{guest}");
    }
    assert_eq!(host.one("opaque"), "probe xattr: y", "{host}");
    assert_eq!(host.one("opaque with userxattr"), "probe xattr: y", "{host}");
    assert_eq!(host.one("whiteout"), "character special file 0 0");
}

#[test]
fn devices_and_mounts_of_the_host_are_seen_as_such() {
    let (guest, host) = (RIGHTS.guest("rights"), RIGHTS.host());
    assert!(guest.one("taken").ends_with("File exists"), "{guest}");
    assert!(guest.one("refused").ends_with("Operation not permitted"), "{guest}");
    for side in [&guest, &host] {
        assert_eq!(side.one("device"), "block special file 8 12c", "{guest}{host}");
    }
    assert_eq!(guest.one("below"), "another file system", "{guest}");
    assert_eq!(guest.one("announced"), "another device", "{guest}");
}

#[test]
fn two_guests_and_the_host_see_each_others_locks() {
    let host = LOCKS.host();
    for name in ["first", "second"] {
        let guest = LOCKS.guest(name);
        guest.ended(0, ENDED);
        assert_eq!(guest.one("probe files"), CHECKS, "{guest}");
        assert_eq!(guest.one("host"), "probe locked: true true", "{guest}");
        complains_of_nothing_else(&guest);
    }
    assert_eq!(LOCKS.guest("second").one("first"), "probe locked: true true");
    assert_eq!(host.one("order"), "first second", "{host}");
}
