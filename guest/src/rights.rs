//! The probe of rights: what the modes, owners and attributes of files allow and become, for root and for two
//! ordinary users.
//!
//! Called by [`crate::probe`], in a guest as root: busybox has neither ACLs nor a write in place as another
//! user.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, IFlags, Mode, StatxFlags, XattrFlags, getxattr, setxattr};
use rustix::process::umask;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use crate::files::{expect, in_another_process};
use crate::map::PAGE;
use crate::outcome::{Outcome, failed};

type Check = fn(&Path) -> Outcome<()>;

/// Each gets a path at which there is nothing.
const CHECKS: [(&str, Check); 7] = [
    ("set-id", set_id),
    ("capability", capability),
    ("acl", acl),
    ("default-acl", default_acl),
    ("group", group),
    ("flags", flags),
    ("made", made),
];

/// Two ordinary users.
const USER: u32 = 1000;
const OTHER: u32 = 1001;

/// Runs each check in a directory.
pub fn all(directory: &str) -> Outcome<String> {
    for (name, check) in CHECKS {
        check(&Path::new(directory).join(name)).map_err(|sentence| format!("{name}: {sentence}"))?;
    }
    let names = CHECKS.map(|(name, _)| name);
    Ok(format!("probe rights: {}", names.join(" ")))
}

/// What another process does as that user, in a group of the same number and in these.
fn as_user(user: u32, groups: &[u32], act: impl FnOnce() -> io::Result<()>) -> Outcome<bool> {
    let groups: Vec<_> = groups.iter().map(|&group| Gid::from_raw(group)).collect();
    in_another_process(|| {
        let becomes = set_thread_groups(&groups)
            .and_then(|()| set_thread_gid(Gid::from_raw(user)))
            .and_then(|()| set_thread_uid(Uid::from_raw(user)));
        becomes.is_ok() && act().is_ok()
    })
}

fn set_mode(path: &Path, mode: u32) -> Outcome<()> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("change the mode of", path))
}

fn mode(path: &Path) -> Outcome<u32> {
    Ok(fs::metadata(path).map_err(failed("look at", path))?.mode() & 0o7777)
}

/// Two pages that anyone may write.
fn make(path: &Path, mode: u32) -> Outcome<()> {
    fs::write(path, [1; 2 * PAGE]).map_err(failed("write", path))?;
    set_mode(path, mode)
}

/// Not at the end, and not as a new file: with DAX, no request tells of such a write.
fn write_in_place(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all_at(b"in place", 100)
}

fn truncate(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.set_len(PAGE as u64)
}

fn set_id(path: &Path) -> Outcome<()> {
    for (before, after) in [(0o6777, 0o777), (0o4777, 0o777), (0o2777, 0o777)] {
        for (name, change) in [("a write", write_in_place as fn(&Path) -> _), ("a truncation", truncate)] {
            make(path, before)?;
            expect("whether root writes", change(path).is_ok(), true)?;
            expect(&format!("{before:o} after {name} as root"), mode(path)?, before)?;
            make(path, before)?;
            expect("whether a user writes", as_user(USER, &[], || change(path))?, true)?;
            expect(&format!("{before:o} after {name} as a user"), mode(path)?, after)?;
        }
        make(path, before)?;
        chown(path, Some(USER), Some(USER)).map_err(failed("change the owner of", path))?;
        expect(&format!("{before:o} of another owner"), mode(path)?, after)?;
        chown(path, Some(0), Some(0)).map_err(failed("change the owner of", path))?;
    }
    Ok(())
}

fn capability(path: &Path) -> Outcome<()> {
    const NAME: &str = "security.capability";
    // VFS_CAP_REVISION_2, CAP_NET_RAW.
    let mut value = [0; 20];
    (value[3], value[5]) = (0x02, 0x20);
    let is_there = || getxattr(path, NAME, &mut [0; 100][..]).is_ok();
    for as_root in [true, false] {
        make(path, 0o777)?;
        setxattr(path, NAME, &value, XattrFlags::empty()).map_err(failed("give a capability to", path))?;
        expect("whether the capability is there", is_there(), true)?;
        match as_root {
            true => write_in_place(path).map_err(failed("write", path))?,
            false => expect("whether a user writes", as_user(USER, &[], || write_in_place(path))?, true)?,
        }
        expect("whether it is there after a write", is_there(), false)?;
    }
    Ok(())
}

/// `struct posix_acl_xattr_header` and entries of tag, permissions and id.
fn acl_of(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn acl(path: &Path) -> Outcome<()> {
    make(path, 0o644)?;
    // Owner, a user, group, mask, others.
    let rule = acl_of(&[(1, 6, !0), (2, 0, USER), (4, 4, !0), (0x10, 4, !0), (0x20, 4, !0)]);
    setxattr(path, "system.posix_acl_access", &rule, XattrFlags::empty()).map_err(failed("rule", path))?;
    let read = || fs::read(path).map(|_| ());
    expect("whether another user reads", as_user(OTHER, &[], read)?, true)?;
    expect("whether the user reads who may not", as_user(USER, &[], read)?, false)
}

fn default_acl(path: &Path) -> Outcome<()> {
    let before = umask(Mode::from_raw_mode(0o077));
    let modes = || {
        let (directory, file) = (path.join("directory"), path.join("file"));
        fs::create_dir(&directory).map_err(failed("make", &directory))?;
        fs::write(&file, "").map_err(failed("make", &file))?;
        let modes = (mode(&directory)?, mode(&file)?);
        fs::remove_dir(&directory).map_err(failed("remove", &directory))?;
        fs::remove_file(&file).map_err(failed("remove", &file))?;
        Outcome::Ok(modes)
    };
    fs::create_dir(path).map_err(failed("make", path))?;
    let plain = modes()?;
    let rule = acl_of(&[(1, 7, !0), (4, 5, !0), (0x20, 5, !0)]);
    setxattr(path, "system.posix_acl_default", &rule, XattrFlags::empty()).map_err(failed("rule", path))?;
    let ruled = modes()?;
    let _ours = umask(before);
    expect("the modes by umask", plain, (0o700, 0o600))?;
    expect("the modes by default ACL", ruled, (0o755, 0o644))
}

/// A directory gives its group to what is made in it.
fn group(path: &Path) -> Outcome<()> {
    const GROUP: u32 = 77;
    fs::create_dir(path).map_err(failed("make", path))?;
    chown(path, None, Some(GROUP)).map_err(failed("change the group of", path))?;
    set_mode(path, 0o2777)?;
    for (name, groups, expected) in [("member", &[GROUP][..], 0o2755), ("stranger", &[], 0o755)] {
        let file = path.join(name);
        let make = || OpenOptions::new().write(true).create_new(true).mode(0o2755).open(&file).map(|_| ());
        expect("whether a user makes a file", as_user(USER, groups, make)?, true)?;
        let metadata = fs::metadata(&file).map_err(failed("look at", &file))?;
        expect("its owner", (metadata.uid(), metadata.gid()), (USER, GROUP))?;
        expect(&format!("the mode of the file of a {name}"), mode(&file)?, expected)?;
    }
    let directory = path.join("directory");
    let make = || fs::DirBuilder::new().mode(0o755).create(&directory);
    expect("whether a user makes a directory", as_user(USER, &[], make)?, true)?;
    expect("its mode", mode(&directory)?, 0o2755)
}

fn flags(path: &Path) -> Outcome<()> {
    make(path, 0o600)?;
    let file = File::open(path).map_err(failed("open", path))?;
    let get = || rustix::fs::ioctl_getflags(&file).map_err(failed("read the flags of", path));
    let before = get()?;
    rustix::fs::ioctl_setflags(&file, before | IFlags::NODUMP).map_err(failed("set a flag of", path))?;
    expect("the flags", get()?, before | IFlags::NODUMP)
}

fn made(path: &Path) -> Outcome<()> {
    make(path, 0o600)?;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let found = rustix::fs::statx(CWD, path, AtFlags::empty(), wanted).map_err(failed("look at", path))?;
    expect("what is known", found.stx_mask & wanted.bits(), wanted.bits())?;
    let times = [found.stx_btime, found.stx_mtime].map(|time| (time.tv_sec, time.tv_nsec));
    expect("whether it was made before it was written", times[0] <= times[1] && times[0].0 > 0, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this machine's own file system does is what the probe expects of any.
    #[test]
    fn a_file_system_that_works_passes() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: for root only");
            return;
        }
        let directory = std::env::temp_dir().join(format!("hotslot-rights-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        set_mode(&directory, 0o755).unwrap();
        let outcome = all(directory.to_str().unwrap());
        fs::remove_dir_all(&directory).unwrap();
        assert!(outcome.unwrap().ends_with("flags made"));
    }
}
