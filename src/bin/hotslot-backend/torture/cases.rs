//! Requests on the backend channel that a front-end must carry out or refuse: one case each, with a verdict.
//!
//! By the specification the channel remains usable after each. The cases at which some front-ends close it
//! come last.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::{ChannelError, Outcome};
use super::files::{self, PAGE};
use super::trial::{Case, FRAMING, Trial, UNSAID};
use super::wire::{MAP, MMap, UNMAP, flags, message};

const MAPS: &str = "maps it and answers 0 (vhost-user, BACKEND_SHMEM_MAP)";
const MMAP_CANNOT: &str =
    "refuses a mapping that mmap(2) cannot make (vhost-user, BACKEND_SHMEM_MAP: 0 means that it is mapped)";
const IN_REGION: &str = "refuses a range that is not entirely inside the region (vhost-user, BACKEND_SHMEM_MAP: a valid, free part of it)";
const NO_OVERLAP: &str =
    "refuses a mapping over another, which stays as it was (vhost-user, BACKEND_SHMEM_MAP)";
const ENTIRE: &str = "refuses all but the whole of one mapping (vhost-user, BACKEND_SHMEM_UNMAP)";
const ANSWERS: &str = "answers each request that asks for it, in order (vhost-user, REPLY_ACK)";

const fn case(
    name: &'static str,
    about: &'static str,
    duty: &'static str,
    run: fn(&mut Trial<'_>) -> Result<(), ChannelError>,
) -> Case {
    Case { name, about, duty, run }
}

/// All cases, in the order in which `everything` takes them.
pub const CASES: &[Case] = &[
    case("map", "MAP and UNMAP of a page, read-only", MAPS, |t| t.maps_and_unmaps(t.page(0))),
    case("map-read-write", "MAP and UNMAP of a page, read-write", MAPS, |t| {
        t.maps_and_unmaps(MMap { flags: MMap::READ_WRITE, ..t.page(0) })
    }),
    case("map-last-page", "MAP that ends where the region ends", MAPS, |t| {
        t.maps_and_unmaps(MMap { shm_offset: t.size - PAGE, ..t.page(0) })
    }),
    case("map-fd-offset", "MAP of the second page of a file", MAPS, |t| {
        t.maps_and_unmaps(MMap { fd_offset: PAGE, ..t.page(0) })
    }),
    case("map-read-only-fd", "MAP, read-only, of a descriptor that is open for reading only", MAPS, |t| {
        let fd = files::read_only(&files::file(2, PAGE)?)?;
        t.must_map(t.page(0), fd.as_fd())
    }),
    case("map-adjacent", "MAPs that touch each other", MAPS, |t| {
        let file = files::file(2, 3 * PAGE)?;
        [1, 0, 2].into_iter().try_for_each(|page| t.must_map(t.page(page), file.as_fd()))
    }),
    case("map-same-file", "MAPs of the same part of the same file at two places", MAPS, |t| {
        let file = files::file(2, PAGE)?;
        [0, 2].into_iter().try_for_each(|page| t.must_map(t.page(page), file.as_fd()))
    }),
    case(
        "map-other-region",
        "MAPs at the same offset of two regions",
        "keeps regions apart (VIRTIO 2.10: each shmid is a region of its own)",
        |t| {
            let file = files::file(2, PAGE)?;
            let other =
                t.channel.shared.device.regions.iter().find(|(shmid, size)| *shmid != 0 && *size >= 4 * PAGE);
            let Some(&(shmid, _)) = other else {
                t.skip("there is only one region: --region gives more");
                return Ok(());
            };
            let offset = MMap { shm_offset: 3 * PAGE, ..t.page(0) };
            t.must_refuse_map(offset, &[file.as_fd()])?;
            t.must_map(MMap { shmid, ..offset }, file.as_fd())?;
            t.must_unmap(MMap { shmid, ..offset })
        },
    ),
    case("map-again", "MAP of another file where one was unmapped", MAPS, |t| {
        (0..3).try_for_each(|_| t.maps_and_unmaps(t.pages(0, 2)))
    }),
    case(
        "unaligned-shm-offset",
        "MAP at an offset in the region that is no multiple of the page size",
        MMAP_CANNOT,
        |t| t.each_refused(&[1, 0x800, PAGE - 1].map(|by| MMap { shm_offset: t.start + by, ..t.page(0) })),
    ),
    case(
        "unaligned-fd-offset",
        "MAP from an offset in the file that is no multiple of the page size",
        MMAP_CANNOT,
        |t| t.each_refused(&[1, 0x800, PAGE - 1].map(|fd_offset| MMap { fd_offset, ..t.page(0) })),
    ),
    case(
        "unaligned-len",
        "MAP of a length that is no multiple of the page size, and UNMAP of it",
        UNSAID,
        |t| t.may_map(MMap { len: PAGE + 0x10, ..t.page(0) }),
    ),
    case("zero-len", "MAP of no bytes", UNSAID, |t| t.may_map(MMap { len: 0, ..t.page(0) })),
    case("out-of-bounds", "MAPs that end, or begin, beyond the region", IN_REGION, |t| {
        let size = t.size;
        let ranges =
            [(size - PAGE, 2 * PAGE), (size, PAGE), (size + PAGE, PAGE), (1 << 62, PAGE), (0, size + PAGE)];
        t.each_refused(&ranges.map(|(shm_offset, len)| MMap { shm_offset, len, ..t.page(0) }))
    }),
    case("overflow", "MAPs whose shm_offset + len is more than 2^64", IN_REGION, |t| {
        let last = !(PAGE - 1);
        let ranges = [(last, PAGE), (last, 2 * PAGE), (t.start, last), (PAGE, u64::MAX), (last, u64::MAX)];
        t.each_refused(&ranges.map(|(shm_offset, len)| MMap { shm_offset, len, ..t.page(0) }))
    }),
    case("fd-overflow", "MAPs whose fd_offset + len is more than 2^63, or 2^64", MMAP_CANNOT, |t| {
        let last = !(PAGE - 1);
        t.each_refused(
            &[last, 1 << 63, (1 << 63) - PAGE].map(|fd_offset| MMap { fd_offset, ..t.pages(0, 2) }),
        )
    }),
    case(
        "unknown-shmid",
        "MAP and UNMAP with the id of a region that there is not",
        "refuses an id that GET_SHMEM_CONFIG did not announce (vhost-user, BACKEND_SHMEM_MAP)",
        |t| {
            let shared = &t.channel.shared;
            let unknown: Vec<_> = (0..=255).filter(|shmid| shared.region_size(*shmid) == 0).collect();
            let (Some(&first), Some(&last)) = (unknown.first(), unknown.last()) else {
                t.skip("there are all 256");
                return Ok(());
            };
            for shmid in [first, last] {
                t.each_refused(&[MMap { shmid, ..t.page(0) }])?;
                t.must_refuse_unmap(MMap { shmid, ..t.page(0) })?;
            }
            Ok(())
        },
    ),
    case("unknown-flags", "MAPs with flags that mean nothing", UNSAID, |t| {
        [2, 3, 1 << 63].into_iter().try_for_each(|flags| t.may_map(MMap { flags, ..t.page(0) }))
    }),
    case("padding", "MAP with padding that is not zero", UNSAID, |t| {
        t.may_map(MMap { padding: [0xff; 7], ..t.page(0) })
    }),
    case("past-end-of-file", "MAP of more than the file has", UNSAID, |t| t.may_map(t.pages(0, 8))),
    case(
        "overlap",
        "MAPs over another one: the same, its first page, its last, one inside, all around",
        NO_OVERLAP,
        |t| {
            let file = files::file(2, 8 * PAGE)?;
            t.must_map(t.pages(2, 3), file.as_fd())?;
            for (page, pages) in [(2, 3), (2, 1), (4, 1), (3, 1), (0, 3), (4, 3), (1, 5)] {
                t.must_refuse_map(t.pages(page, pages), &[file.as_fd()])?;
            }
            t.must_map(t.pages(0, 2), file.as_fd())?;
            t.must_unmap(t.pages(2, 3))
        },
    ),
    case("overlap-pattern", "MAPs over the pattern", NO_OVERLAP, |t| {
        let whole = MMap { shm_offset: 0, len: t.start, ..t.page(0) };
        let last = MMap { shm_offset: t.start - PAGE, len: 2 * PAGE, ..t.page(0) };
        t.each_refused(&[whole, MMap { len: PAGE, ..whole }, last])
    }),
    case("pipe", "MAP of a pipe, and whether the front-end closes its copy then", MMAP_CANNOT, |t| {
        let (ours, theirs) = files::pipe()?;
        t.must_refuse_map(t.page(0), &[theirs.as_fd()])?;
        drop(theirs);
        if !hangs_up(ours.as_fd()) {
            t.line("the front-end keeps the descriptor of the refused MAP");
        }
        Ok(())
    }),
    case("socket", "MAP of a socket", MMAP_CANNOT, |t| {
        t.must_refuse_map(t.page(0), &[files::socket()?.as_fd()])
    }),
    case("directory", "MAP of a directory", MMAP_CANNOT, |t| {
        t.must_refuse_map(t.page(0), &[files::directory()?.as_fd()])
    }),
    case("device", "MAP of a character device without memory (/dev/null)", MMAP_CANNOT, |t| {
        t.must_refuse_map(t.page(0), &[files::device()?.as_fd()])
    }),
    case(
        "read-only-fd",
        "MAP, read-write, of a descriptor that is open for reading only",
        MMAP_CANNOT,
        |t| {
            let fd = files::read_only(&files::file(2, PAGE)?)?;
            t.must_refuse_map(MMap { flags: MMap::READ_WRITE, ..t.page(0) }, &[fd.as_fd()])
        },
    ),
    case("unmap-part", "UNMAPs of the beginning, the end and the middle of a mapping", ENTIRE, |t| {
        t.unmaps_refused(&[t.pages(1, 2), t.pages(2, 2), t.page(2)])
    }),
    case("unmap-more", "UNMAPs of a mapping and a page before it, after it, or both", ENTIRE, |t| {
        t.unmaps_refused(&[t.pages(0, 4), t.pages(1, 4), t.pages(0, 5)])
    }),
    case("unmap-two", "UNMAP of two adjacent mappings at once", ENTIRE, |t| {
        let file = files::file(2, PAGE)?;
        t.must_map(t.page(0), file.as_fd())?;
        t.must_map(t.page(1), file.as_fd())?;
        t.must_refuse_unmap(t.pages(0, 2))?;
        t.must_unmap(t.page(0))?;
        t.must_unmap(t.page(1))
    }),
    case(
        "unmap-unaligned",
        "UNMAPs of a mapping's range with an offset or a length that is not quite its own",
        ENTIRE,
        |t| {
            let range = t.pages(1, 3);
            let (shm_offset, len) = (range.shm_offset + 1, range.len - 1);
            t.unmaps_refused(&[MMap { shm_offset, ..range }, MMap { len, ..range }, MMap { len: 0, ..range }])
        },
    ),
    case("unmap-overflow", "UNMAPs whose shm_offset + len is more than 2^64", ENTIRE, |t| {
        let last = !(PAGE - 1);
        t.unmaps_refused(&[MMap { len: last, ..t.page(1) }, MMap { shm_offset: last, ..t.pages(0, 2) }])
    }),
    case("unmap-other-region", "UNMAP of a mapping's range in another region", ENTIRE, |t| {
        let others: Vec<_> = (1..=255).map(|shmid| MMap { shmid, ..t.pages(1, 3) }).collect();
        t.unmaps_refused(&[others[0], others[6], others[254]])
    }),
    case("unmap-nothing", "UNMAP where nothing was ever mapped", ENTIRE, |t| t.must_refuse_unmap(t.page(0))),
    case("unmap-twice", "a second UNMAP of the same mapping", ENTIRE, |t| {
        t.maps_and_unmaps(t.page(0))?;
        t.must_refuse_unmap(t.page(0))
    }),
    case("unmap-other-fields", "UNMAP with the fd_offset and flags of another mapping", UNSAID, |t| {
        t.must_map(t.page(0), files::file(2, PAGE)?.as_fd())?;
        t.unmap(MMap { fd_offset: PAGE, flags: MMap::READ_WRITE, ..t.page(0) }, &[])?;
        Ok(())
    }),
    case(
        "unasked",
        "MAP and UNMAP that do not ask for an answer",
        "carries them out and does not answer (vhost-user, REPLY_ACK: only where NEED_REPLY is set)",
        |t| {
            let file = files::file(2, PAGE)?;
            for page in [0, 0, 2] {
                let bytes = message(MAP, flags::VERSION_1, &t.page(page).bytes());
                t.channel.send_own(MAP, &bytes, &[file.as_fd()])?;
            }
            let bytes = message(UNMAP, flags::VERSION_1, &t.page(2).bytes());
            t.channel.send_own(UNMAP, &bytes, &[])?;
            t.line("three MAPs, the second over the first, and the third's UNMAP, none of which asks for an answer");
            t.channel.note(true, &t.page(0));
            t.must_unmap(t.page(0))?;
            t.must_refuse_unmap(t.page(2))
        },
    ),
    case(
        "pipelined",
        "32 MAPs and their UNMAPs sent before the first answer is read; each second UNMAP comes once too often",
        ANSWERS,
        |t| {
            let file = files::file(2, PAGE)?;
            let send = |t: &mut Trial<'_>, id, fds: &[BorrowedFd<'_>]| {
                let bytes = message(id, flags::VERSION_1 | flags::NEED_REPLY, &t.page(0).bytes());
                t.channel.send_own(id, &bytes, fds).map(drop)
            };
            for _ in 0..32 {
                send(t, MAP, &[file.as_fd()])?;
                send(t, UNMAP, &[])?;
                send(t, UNMAP, &[])?;
            }
            for _ in 0..32 {
                for (id, expected) in
                    [(MAP, Outcome::Done), (UNMAP, Outcome::Done), (UNMAP, Outcome::Refused)]
                {
                    let (outcome, _) = t.channel.answer(id)?;
                    t.must("answer in order", outcome, expected);
                }
            }
            t.line("96 requests: answered, in order");
            Ok(())
        },
    ),
    case(
        "many",
        "MAPs of every second page of the region, up to 512, then UNMAPs of them all",
        "maps each, or refuses it for lack of resources (vhost-user, BACKEND_SHMEM_MAP); room that was given back is \
               there again",
        |t| {
            let file = files::file(2, PAGE)?;
            let places = ((t.size - t.start) / PAGE / 2).min(512);
            let mut mapped = 0;
            while mapped < places
                && t.channel.exchange(MAP, &t.page(2 * mapped), &[file.as_fd()])?.0 != Outcome::Refused
            {
                mapped += 1;
            }
            t.line(format_args!("{mapped} of {places} MAPs: done"));
            let Some(last) = mapped.checked_sub(1).map(|last| t.page(2 * last)) else {
                t.wrong("it mapped nothing at all".to_owned());
                return Ok(());
            };
            t.must_unmap(last)?;
            t.must_map(last, file.as_fd())
        },
    ),
    case(
        "not-negotiated",
        "MAP and UNMAP where the front-end did not accept SHMEM",
        "refuses requests of a feature that was not negotiated (vhost-user, BACKEND_SHMEM_MAP: when SHMEM has been negotiated)",
        |t| {
            t.each_refused(&[t.page(0)])?;
            t.must_refuse_unmap(t.page(0))
        },
    ),
    case(
        "no-fd",
        "MAP without a descriptor",
        "refuses it (vhost-user, BACKEND_SHMEM_MAP: a descriptor and the payload)",
        |t| t.must_refuse_map(t.page(0), &[]),
    ),
    case("two-fds", "MAP with two descriptors", UNSAID, |t| {
        let file = files::file(2, PAGE)?;
        t.map(t.page(0), &[file.as_fd(), file.as_fd()])?;
        Ok(())
    }),
    case("unmap-fd", "UNMAP with a descriptor", UNSAID, |t| {
        let file = files::file(2, PAGE)?;
        t.must_map(t.page(0), file.as_fd())?;
        t.unmap(t.page(0), &[file.as_fd()])?;
        Ok(())
    }),
    case(
        "split",
        "MAP and UNMAP sent byte by byte",
        "puts messages together (vhost-user, Message Specification: a stream of bytes)",
        |t| {
            let file = files::file(2, PAGE)?;
            for (id, fds) in [(MAP, &[file.as_fd()][..]), (UNMAP, &[])] {
                let bytes = message(id, flags::VERSION_1 | flags::NEED_REPLY, &t.page(0).bytes());
                // The descriptor comes with the first byte.
                t.channel.send(&bytes[..1], fds)?;
                for byte in &bytes[1..] {
                    thread::sleep(Duration::from_micros(100));
                    t.channel.send(&[*byte], &[])?;
                }
                let (outcome, _) = t.channel.answer(id)?;
                let done = t.must("carry out", outcome, Outcome::Done);
                t.line(format_args!("52 bytes, one by one: {done}"));
            }
            Ok(())
        },
    ),
    case("wrong-size", "MAPs with payloads of 0, 39, 41 and 80 bytes", FRAMING, |t| {
        for len in [0, 39, 41, 80] {
            let mut payload = t.page(0).bytes();
            payload.resize(len, 0);
            let bytes = message(MAP, flags::VERSION_1 | flags::NEED_REPLY, &payload);
            let what = format!("MAP with {len} bytes of payload");
            let outcome = t.channel.other(t.name, &what, &bytes, MAP)?;
            t.must("refuse", outcome, Outcome::Refused);
        }
        Ok(())
    }),
    case(
        "unknown-id",
        "requests with ids that no request of a back-end has: 0, 11, 44, 255, 2^32 - 1",
        FRAMING,
        |t| {
            for id in [0, 11, 44, 255, u32::MAX] {
                let bytes = message(id, flags::VERSION_1 | flags::NEED_REPLY, &[0; 16]);
                let outcome = t.channel.other(t.name, &format!("request {id}"), &bytes, id)?;
                t.must("refuse", outcome, Outcome::Refused);
            }
            Ok(())
        },
    ),
];

/// Whether the other end of the pipe is closed within a second.
fn hangs_up(pipe: BorrowedFd<'_>) -> bool {
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&second)).is_ok_and(|ready| ready == 1)
}
