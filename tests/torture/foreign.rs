//! Against another front-end: that of the `vhost` crate, with its own idea of shared memory, right or wrong.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::thread;

use hotslot_test_support::torture::Torture;
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{
    Error, Frontend, FrontendReqHandler, VhostUserFrontend, VhostUserFrontendReqHandlerMut,
    VhostUserProtocolFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

const PAGE: u64 = 4096;
const MEMORY: u64 = 64 * PAGE;

/// Which rule the front-end breaks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Breaks {
    Nothing,
    Overlaps,
    Bounds,
    Access,
    EntireUnmaps,
    Everything,
}

/// A front-end's shared memory, mapped into nothing.
struct Regions {
    sizes: Vec<u64>,
    breaks: Breaks,
    live: Vec<(u8, u64, u64)>,
}

fn refuse(errno: i32) -> io::Result<u64> {
    Err(io::Error::from_raw_os_error(errno))
}

impl VhostUserFrontendReqHandlerMut for Regions {
    fn shmem_map(&mut self, request: &VhostUserMMap, file: &dyn AsRawFd) -> io::Result<u64> {
        let VhostUserMMap { shmid, fd_offset, shm_offset, len, flags, .. } = *request;
        let size = self.sizes[usize::from(shmid)];
        let beyond = shm_offset + len > size || size == 0;
        let overlaps = self
            .live
            .iter()
            .any(|(id, start, long)| *id == shmid && shm_offset < start + long && *start < shm_offset + len);
        // What cannot be mapped is refused by the kernel.
        let protection =
            match flags & VhostUserMMapFlags::WRITABLE.bits() != 0 && self.breaks != Breaks::Access {
                true => libc::PROT_READ | libc::PROT_WRITE,
                false => libc::PROT_READ,
            };
        // SAFETY: a duplicate of a descriptor that the caller owns.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(file.as_raw_fd()) }.try_clone_to_owned()?;
        // SAFETY: the kernel chooses where; nobody touches it; removed below.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                fd_offset as i64,
            )
        };
        if mapped == libc::MAP_FAILED || shm_offset % PAGE != 0 {
            return refuse(libc::EINVAL);
        }
        // SAFETY: what was just mapped.
        unsafe { libc::munmap(mapped, len as usize) };
        match self.breaks {
            Breaks::Everything => return refuse(libc::EPERM),
            Breaks::Bounds if size > 0 => {}
            _ if beyond => return refuse(libc::ERANGE),
            _ => {}
        }
        if overlaps && self.breaks != Breaks::Overlaps {
            return refuse(libc::EEXIST);
        }
        self.live.push((shmid, shm_offset, len));
        Ok(0)
    }

    fn shmem_unmap(&mut self, request: &VhostUserMMap) -> io::Result<u64> {
        let (shmid, shm_offset, len) = (request.shmid, request.shm_offset, request.len);
        let exactly = |live: &&(u8, u64, u64)| {
            let long_enough = live.2 == len || self.breaks == Breaks::EntireUnmaps && len < live.2;
            live.0 == shmid && live.1 == shm_offset && long_enough
        };
        match self.live.iter().find(exactly).copied() {
            Some(found) => {
                self.live.retain(|live| *live != found);
                Ok(0)
            }
            None => refuse(libc::ENOENT),
        }
    }
}

/// Runs a back-end that does these things against such a front-end. Gives its exit status and what it
/// printed.
fn run(steps: &[&str], breaks: Breaks, until: &str) -> (Option<i32>, String) {
    let steps = steps.iter().flat_map(|step| ["--do", step]);
    let options = ["--once", "--patience", "2"].into_iter().chain(steps);
    let torture = Torture::start(&options.collect::<Vec<_>>());
    let mut frontend = Frontend::connect(torture.socket(), 1).unwrap();
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    frontend.set_features(features).unwrap();
    let offered = frontend.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::BACKEND_SEND_FD
        | VhostUserProtocolFeatures::SHMEM;
    assert!(offered.contains(wanted), "{offered:?}");
    frontend.set_protocol_features(wanted).unwrap();
    frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(frontend.get_queue_num().unwrap(), 1);
    let config = frontend.get_shmem_config().unwrap();
    let regions = Regions { sizes: { config.memory_sizes }.to_vec(), breaks, live: Vec::new() };
    let mut handler = FrontendReqHandler::new(Arc::new(Mutex::new(regions))).unwrap();
    handler.set_reply_ack_flag(true);
    frontend.set_backend_request_fd(&handler.get_tx_raw_fd()).unwrap();
    let channel = thread::spawn(move || {
        while !matches!(
            handler.handle_request(),
            Err(Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage)
        ) {}
    });

    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    let memory = MmapRegion::<()>::from_file(FileOffset::new(file, 0), MEMORY as usize).unwrap();
    let start = memory.as_ptr() as u64;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: start,
        mmap_offset: 0,
        mmap_handle: memory.file_offset().unwrap().file().as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).unwrap();
    let ring = VringConfigData {
        queue_max_size: 8,
        queue_size: 8,
        flags: 0,
        desc_table_addr: start,
        used_ring_addr: start + PAGE,
        avail_ring_addr: start + 2 * PAGE,
        log_addr: None,
    };
    let [call, kick] = [(); 2].map(|()| EventFd::new(0).unwrap());
    frontend.set_vring_num(0, 8).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    frontend.set_vring_addr(0, &ring).unwrap();
    frontend.set_vring_call(0, &call).unwrap();
    frontend.set_vring_kick(0, &kick).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    torture.wait_for(until);
    drop(frontend);
    let (status, output) = torture.wait();
    channel.join().unwrap();
    (status.code(), output)
}

#[test]
fn a_front_end_that_knows_the_rules_does_as_specified() {
    let (status, output) = run(&["everything"], Breaks::Nothing, "so far: ");
    // The crate by itself does not answer a request whose fields it finds invalid, nor a MAP without a
    // descriptor, after which it has lost its place.
    let wrong: Vec<_> = output.lines().filter(|line| line.contains("NOT as specified: ")).collect();
    for line in &wrong {
        assert!(line.contains("NOT as specified: no answer within 2 s"), "{output}");
    }
    assert!(output.matches(": as specified").count() >= 28, "{output}");
    assert_eq!(status, Some(i32::from(!wrong.is_empty())), "{output}");
    let (status, output) = run(&["overlap", "flood=1000"], Breaks::Nothing, "flood: ");
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("1000 pairs of MAP and UNMAP answered"), "{output}");
    assert!(output.contains("0 requests refused"), "{output}");
}

#[test]
fn where_nothing_was_tried_is_no_success() {
    // A front-end whose driver starts no device.
    for step in ["everything", "mute@kick"] {
        let torture = Torture::start(&["--once", "--do", step]);
        let frontend = Frontend::connect(torture.socket(), 1).unwrap();
        frontend.set_owner().unwrap();
        frontend.get_features().unwrap();
        drop(frontend);
        let (status, output) = torture.wait();
        assert_eq!(status.code(), Some(1), "{step}: {output}");
        assert!(output.contains("error: nothing of --do could be tried"), "{step}: {output}");
    }
    // A case without a verdict counts as not tried: SHMEM was negotiated.
    let (status, output) = run(&["not-negotiated"], Breaks::Nothing, "no verdict");
    assert_eq!(status, Some(1), "{output}");
    // Without --do nothing is to be tried.
    let (status, output) = run(&[], Breaks::Nothing, "MAP");
    assert_eq!(status, Some(0), "{output}");
}

#[test]
fn a_front_end_that_breaks_a_rule_is_found_out() {
    for (breaks, case) in [
        (Breaks::Overlaps, "overlap"),
        (Breaks::Bounds, "out-of-bounds"),
        (Breaks::Access, "read-only-fd"),
        (Breaks::EntireUnmaps, "unmap-part"),
        (Breaks::Everything, "map"),
    ] {
        let (status, output) = run(&[case], breaks, &format!("{case}: NOT as specified"));
        assert_eq!(status, Some(1), "{breaks:?}: {output}");
        // The same case, where nothing is broken.
        let (status, output) = run(&[case], Breaks::Nothing, &format!("{case}: as specified"));
        assert_eq!(status, Some(0), "{output}");
    }
}
