//! Requests on the backend channel that a front-end has to carry out or refuse, one case each. All leave the
//! channel usable, as far as the specification says; those with which a front-end may see it otherwise come
//! last.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::{Channel, Gone, Outcome};
use super::files::{self, PAGE};
use super::report::Verdict;
use super::wire::{MAP, MMap, UNMAP, flags, message};

/// What is tried.
#[derive(Debug)]
pub struct Case {
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// What a correct front-end does about it, and where that is written.
    pub duty: &'static str,
    run: fn(&mut Trial<'_>) -> Result<(), Gone>,
}

const MAPS: &str = "maps it and answers 0 (vhost-user, BACKEND_SHMEM_MAP)";
const MMAP_CANNOT: &str =
    "refuses what it cannot mmap (vhost-user, BACKEND_SHMEM_MAP: 0 means that it is mapped; mmap(2))";
const IN_REGION: &str =
    "refuses what is not all inside the region (vhost-user, BACKEND_SHMEM_MAP: a valid, free part of it)";
const NO_OVERLAP: &str =
    "refuses a mapping over another, which stays as it was (vhost-user, BACKEND_SHMEM_MAP)";
const ENTIRE: &str = "refuses all but the whole of one mapping (vhost-user, BACKEND_SHMEM_UNMAP)";
const ANSWERS: &str = "answers each request that asks for it, in order (vhost-user, REPLY_ACK)";
const UNSAID: &str = "carries it out or refuses it (vhost-user does not say), and goes on";
const FRAMING: &str =
    "refuses what is no request (vhost-user, Back-end message types), and goes on or closes the channel";

/// All cases, in the order in which `everything` takes them.
pub const CASES: &[Case] = &[
    Case {
        name: "map",
        about: "MAP and UNMAP of a page, read-only",
        duty: MAPS,
        run: |t| t.maps_and_unmaps(t.page(0)),
    },
    Case {
        name: "map-read-write",
        about: "MAP and UNMAP of a page, read-write",
        duty: MAPS,
        run: |t| t.maps_and_unmaps(MMap { flags: MMap::READ_WRITE, ..t.page(0) }),
    },
    Case {
        name: "map-last-page",
        about: "MAP that ends where the region ends",
        duty: MAPS,
        run: |t| t.maps_and_unmaps(MMap { shm_offset: t.size - PAGE, ..t.page(0) }),
    },
    Case {
        name: "map-fd-offset",
        about: "MAP of the second page of a file",
        duty: MAPS,
        run: |t| t.maps_and_unmaps(MMap { fd_offset: PAGE, ..t.page(0) }),
    },
    Case {
        name: "map-read-only-fd",
        about: "MAP, read-only, of a descriptor that is open for reading only",
        duty: MAPS,
        run: |t| {
            let fd = files::read_only(&files::file(2, PAGE)?)?;
            t.must_map(t.page(0), fd.as_fd())
        },
    },
    Case {
        name: "map-adjacent",
        about: "MAPs that touch each other",
        duty: MAPS,
        run: |t| {
            let file = files::file(2, 3 * PAGE)?;
            [1, 0, 2].into_iter().try_for_each(|page| t.must_map(t.page(page), file.as_fd()))
        },
    },
    Case {
        name: "map-same-file",
        about: "MAPs of the same part of the same file at two places",
        duty: MAPS,
        run: |t| {
            let file = files::file(2, PAGE)?;
            [0, 2].into_iter().try_for_each(|page| t.must_map(t.page(page), file.as_fd()))
        },
    },
    Case {
        name: "map-other-region",
        about: "MAPs at the same offset of two regions",
        duty: "keeps regions apart (VIRTIO 2.10: each shmid is a region of its own)",
        run: |t| {
            let file = files::file(2, PAGE)?;
            let other =
                t.channel.shared.device.regions.iter().find(|(shmid, size)| *shmid != 0 && *size >= 4 * PAGE);
            let Some(&(shmid, _)) = other else {
                {
                    t.skip("there is only one region: --region gives more");
                    return Ok(());
                }
            };
            let offset = MMap { shm_offset: 3 * PAGE, ..t.page(0) };
            t.must_refuse_map(offset, &[file.as_fd()])?;
            t.must_map(MMap { shmid, ..offset }, file.as_fd())?;
            t.must_unmap(MMap { shmid, ..offset })
        },
    },
    Case {
        name: "map-again",
        about: "MAP of another file where one was unmapped",
        duty: MAPS,
        run: |t| (0..3).try_for_each(|_| t.maps_and_unmaps(t.pages(0, 2))),
    },
    Case {
        name: "unaligned-shm-offset",
        about: "MAP at an offset in the region that is no multiple of the page size",
        duty: MMAP_CANNOT,
        run: |t| {
            t.each_refused(&[1, 0x800, PAGE - 1].map(|by| MMap { shm_offset: t.start + by, ..t.page(0) }))
        },
    },
    Case {
        name: "unaligned-fd-offset",
        about: "MAP from an offset in the file that is no multiple of the page size",
        duty: MMAP_CANNOT,
        run: |t| t.each_refused(&[1, 0x800, PAGE - 1].map(|fd_offset| MMap { fd_offset, ..t.page(0) })),
    },
    Case {
        name: "unaligned-len",
        about: "MAP of a length that is no multiple of the page size, and UNMAP of it",
        duty: UNSAID,
        run: |t| t.may_map(MMap { len: PAGE + 0x10, ..t.page(0) }),
    },
    Case {
        name: "zero-len",
        about: "MAP of no bytes",
        duty: UNSAID,
        run: |t| t.may_map(MMap { len: 0, ..t.page(0) }),
    },
    Case {
        name: "out-of-bounds",
        about: "MAPs that end, or begin, beyond the region",
        duty: IN_REGION,
        run: |t| {
            let size = t.size;
            let ranges = [
                (size - PAGE, 2 * PAGE),
                (size, PAGE),
                (size + PAGE, PAGE),
                (1 << 62, PAGE),
                (0, size + PAGE),
            ];
            t.each_refused(&ranges.map(|(shm_offset, len)| MMap { shm_offset, len, ..t.page(0) }))
        },
    },
    Case {
        name: "overflow",
        about: "MAPs whose shm_offset + len is more than 2^64",
        duty: IN_REGION,
        run: |t| {
            let last = !(PAGE - 1);
            let ranges =
                [(last, PAGE), (last, 2 * PAGE), (t.start, last), (PAGE, u64::MAX), (last, u64::MAX)];
            t.each_refused(&ranges.map(|(shm_offset, len)| MMap { shm_offset, len, ..t.page(0) }))
        },
    },
    Case {
        name: "fd-overflow",
        about: "MAPs whose fd_offset + len is more than 2^63, or 2^64",
        duty: MMAP_CANNOT,
        run: |t| {
            let last = !(PAGE - 1);
            t.each_refused(
                &[last, 1 << 63, (1 << 63) - PAGE].map(|fd_offset| MMap { fd_offset, ..t.pages(0, 2) }),
            )
        },
    },
    Case {
        name: "unknown-shmid",
        about: "MAP and UNMAP with the id of a region that there is not",
        duty: "refuses an id that GET_SHMEM_CONFIG did not announce (vhost-user, BACKEND_SHMEM_MAP)",
        run: |t| {
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
    },
    Case {
        name: "unknown-flags",
        about: "MAPs with flags that mean nothing",
        duty: UNSAID,
        run: |t| [2, 3, 1 << 63].into_iter().try_for_each(|flags| t.may_map(MMap { flags, ..t.page(0) })),
    },
    Case {
        name: "padding",
        about: "MAP with padding that is not zero",
        duty: UNSAID,
        run: |t| t.may_map(MMap { padding: [0xff; 7], ..t.page(0) }),
    },
    Case {
        name: "past-end-of-file",
        about: "MAP of more than the file has",
        duty: UNSAID,
        run: |t| t.may_map(t.pages(0, 8)),
    },
    Case {
        name: "overlap",
        about: "MAPs over another one: the same, its first page, its last, one inside, all around",
        duty: NO_OVERLAP,
        run: |t| {
            let file = files::file(2, 8 * PAGE)?;
            t.must_map(t.pages(2, 3), file.as_fd())?;
            for (page, pages) in [(2, 3), (2, 1), (4, 1), (3, 1), (0, 3), (4, 3), (1, 5)] {
                t.must_refuse_map(t.pages(page, pages), &[file.as_fd()])?;
            }
            t.must_map(t.pages(0, 2), file.as_fd())?;
            t.must_unmap(t.pages(2, 3))
        },
    },
    Case {
        name: "overlap-pattern",
        about: "MAPs over the pattern",
        duty: NO_OVERLAP,
        run: |t| {
            let whole = MMap { shm_offset: 0, len: t.start, ..t.page(0) };
            let last = MMap { shm_offset: t.start - PAGE, len: 2 * PAGE, ..t.page(0) };
            t.each_refused(&[whole, MMap { len: PAGE, ..whole }, last])
        },
    },
    Case {
        name: "pipe",
        about: "MAP of a pipe, and whether the front-end closes its copy then",
        duty: MMAP_CANNOT,
        run: |t| {
            let (ours, theirs) = files::pipe()?;
            t.must_refuse_map(t.page(0), &[theirs.as_fd()])?;
            drop(theirs);
            if !hangs_up(ours.as_fd()) {
                t.line("the front-end keeps the descriptor of what it refused");
            }
            Ok(())
        },
    },
    Case {
        name: "socket",
        about: "MAP of a socket",
        duty: MMAP_CANNOT,
        run: |t| t.must_refuse_map(t.page(0), &[files::socket()?.as_fd()]),
    },
    Case {
        name: "directory",
        about: "MAP of a directory",
        duty: MMAP_CANNOT,
        run: |t| t.must_refuse_map(t.page(0), &[files::directory()?.as_fd()]),
    },
    Case {
        name: "device",
        about: "MAP of a character device without memory (/dev/null)",
        duty: MMAP_CANNOT,
        run: |t| t.must_refuse_map(t.page(0), &[files::device()?.as_fd()]),
    },
    Case {
        name: "read-only-fd",
        about: "MAP, read-write, of a descriptor that is open for reading only",
        duty: MMAP_CANNOT,
        run: |t| {
            let fd = files::read_only(&files::file(2, PAGE)?)?;
            t.must_refuse_map(MMap { flags: MMap::READ_WRITE, ..t.page(0) }, &[fd.as_fd()])
        },
    },
    Case {
        name: "unmap-part",
        about: "UNMAPs of the beginning, the end and the middle of a mapping",
        duty: ENTIRE,
        run: |t| t.unmaps_refused(&[t.pages(1, 2), t.pages(2, 2), t.page(2)]),
    },
    Case {
        name: "unmap-more",
        about: "UNMAPs of a mapping and a page before it, after it, or both",
        duty: ENTIRE,
        run: |t| t.unmaps_refused(&[t.pages(0, 4), t.pages(1, 4), t.pages(0, 5)]),
    },
    Case {
        name: "unmap-two",
        about: "UNMAP of two adjacent mappings at once",
        duty: ENTIRE,
        run: |t| {
            let file = files::file(2, PAGE)?;
            t.must_map(t.page(0), file.as_fd())?;
            t.must_map(t.page(1), file.as_fd())?;
            t.must_refuse_unmap(t.pages(0, 2))?;
            t.must_unmap(t.page(0))?;
            t.must_unmap(t.page(1))
        },
    },
    Case {
        name: "unmap-unaligned",
        about: "UNMAPs of a mapping's range with an offset or a length that is not quite its own",
        duty: ENTIRE,
        run: |t| {
            let range = t.pages(1, 3);
            let (shm_offset, len) = (range.shm_offset + 1, range.len - 1);
            t.unmaps_refused(&[MMap { shm_offset, ..range }, MMap { len, ..range }, MMap { len: 0, ..range }])
        },
    },
    Case {
        name: "unmap-overflow",
        about: "UNMAPs whose shm_offset + len is more than 2^64",
        duty: ENTIRE,
        run: |t| {
            let last = !(PAGE - 1);
            t.unmaps_refused(&[MMap { len: last, ..t.page(1) }, MMap { shm_offset: last, ..t.pages(0, 2) }])
        },
    },
    Case {
        name: "unmap-other-region",
        about: "UNMAP of a mapping's range in another region",
        duty: ENTIRE,
        run: |t| {
            let others: Vec<_> = (1..=255).map(|shmid| MMap { shmid, ..t.pages(1, 3) }).collect();
            t.unmaps_refused(&[others[0], others[6], others[254]])
        },
    },
    Case {
        name: "unmap-nothing",
        about: "UNMAP where nothing was ever mapped",
        duty: ENTIRE,
        run: |t| t.must_refuse_unmap(t.page(0)),
    },
    Case {
        name: "unmap-twice",
        about: "UNMAP of what was unmapped already",
        duty: ENTIRE,
        run: |t| {
            t.maps_and_unmaps(t.page(0))?;
            t.must_refuse_unmap(t.page(0))
        },
    },
    Case {
        name: "unmap-other-fields",
        about: "UNMAP with the fd_offset and flags of another mapping",
        duty: UNSAID,
        run: |t| {
            t.must_map(t.page(0), files::file(2, PAGE)?.as_fd())?;
            t.unmap(MMap { fd_offset: PAGE, flags: MMap::READ_WRITE, ..t.page(0) }, &[])?;
            t.unsaid();
            Ok(())
        },
    },
    Case {
        name: "unasked",
        about: "MAP and UNMAP that do not ask for an answer",
        duty: "carries them out and does not answer (vhost-user, REPLY_ACK: only where NEED_REPLY is set)",
        run: |t| {
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
    },
    Case {
        name: "pipelined",
        about: "32 MAPs and their UNMAPs sent before the first answer is read; each second UNMAP comes once too often",
        duty: ANSWERS,
        run: |t| {
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
    },
    Case {
        name: "many",
        about: "MAPs of every second page of the region, up to 512, then UNMAPs of them all",
        duty: "maps each, or refuses it for want of resources (vhost-user, BACKEND_SHMEM_MAP); room that was given back is \
               there again",
        run: |t| {
            let file = files::file(2, PAGE)?;
            let places = ((t.size - t.start) / PAGE / 2).min(512);
            let mut mapped = 0;
            while mapped < places
                && t.channel.quiet_map(&t.page(2 * mapped), &[file.as_fd()])?.0 != Outcome::Refused
            {
                mapped += 1;
            }
            t.line(format_args!("{mapped} of {places} MAPs: done"));
            let Some(last) = mapped.checked_sub(1).map(|last| t.page(2 * last)) else {
                {
                    t.wrong("it mapped nothing at all".to_owned());
                    return Ok(());
                }
            };
            t.must_unmap(last)?;
            t.must_map(last, file.as_fd())
        },
    },
    Case {
        name: "not-negotiated",
        about: "MAP and UNMAP where the front-end did not accept SHMEM",
        duty: "refuses what was not negotiated (vhost-user, BACKEND_SHMEM_MAP: when SHMEM has been negotiated)",
        run: |t| {
            t.each_refused(&[t.page(0)])?;
            t.must_refuse_unmap(t.page(0))
        },
    },
    Case {
        name: "no-fd",
        about: "MAP without a descriptor",
        duty: "refuses it (vhost-user, BACKEND_SHMEM_MAP: a descriptor and the payload)",
        run: |t| t.must_refuse_map(t.page(0), &[]),
    },
    Case {
        name: "two-fds",
        about: "MAP with two descriptors",
        duty: UNSAID,
        run: |t| {
            let file = files::file(2, PAGE)?;
            t.map(t.page(0), &[file.as_fd(), file.as_fd()])?;
            t.unsaid();
            Ok(())
        },
    },
    Case {
        name: "unmap-fd",
        about: "UNMAP with a descriptor",
        duty: UNSAID,
        run: |t| {
            let file = files::file(2, PAGE)?;
            t.must_map(t.page(0), file.as_fd())?;
            t.unmap(t.page(0), &[file.as_fd()])?;
            t.unsaid();
            Ok(())
        },
    },
    Case {
        name: "split",
        about: "MAP and UNMAP sent byte by byte",
        duty: "puts messages together (vhost-user, Message Specification: a stream of bytes)",
        run: |t| {
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
                let came = t.must("carry out", outcome, Outcome::Done);
                t.line(format_args!("52 bytes, one by one: {came}"));
            }
            Ok(())
        },
    },
    Case {
        name: "wrong-size",
        about: "MAPs with payloads of 0, 39, 41 and 80 bytes",
        duty: FRAMING,
        run: |t| {
            for len in [0, 39, 41, 80] {
                let mut payload = t.page(0).bytes();
                payload.resize(len, 0);
                let bytes = message(MAP, flags::VERSION_1 | flags::NEED_REPLY, &payload);
                let what = format!("MAP with {len} bytes of payload");
                let outcome = t.channel.other(t.name, &what, &bytes, MAP)?;
                t.must("refuse", outcome, Outcome::Refused);
            }
            Ok(())
        },
    },
    Case {
        name: "unknown-id",
        about: "requests with ids that no request of a back-end has: 0, 11, 44, 255, 2^32 - 1",
        duty: FRAMING,
        run: |t| {
            for id in [0, 11, 44, 255, u32::MAX] {
                let bytes = message(id, flags::VERSION_1 | flags::NEED_REPLY, &[0; 16]);
                let outcome = t.channel.other(t.name, &format!("request {id}"), &bytes, id)?;
                t.must("refuse", outcome, Outcome::Refused);
            }
            Ok(())
        },
    },
];

/// Whether the other end of a pipe is closed within a second.
fn hangs_up(pipe: BorrowedFd<'_>) -> bool {
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&second)).is_ok_and(|ready| ready == 1)
}

/// A case that is being tried.
pub struct Trial<'a> {
    name: &'static str,
    channel: &'a mut Channel,
    /// Where region 0 is free, behind the pattern.
    start: u64,
    /// Where it ends.
    size: u64,
    wrong: Vec<String>,
    unsaid: bool,
    skipped: Option<&'static str>,
}

/// Pages behind the pattern that the cases need.
const ROOM: u64 = 12 * PAGE;

/// Tries a case. An error means that the channel cannot be used any more; the verdict says so already.
pub fn try_case(case: &Case, channel: &mut Channel) -> Result<(), Gone> {
    let report = std::sync::Arc::clone(&channel.shared.report);
    let none = |why| {
        report.verdict(case.name, &Verdict::None(why), case.duty);
        Ok(())
    };
    let run = channel.shared.run();
    let (start, size) = (channel.pattern_len(), channel.shared.region_size(0));
    if case.name == "not-negotiated" && channel.agreed.shmem {
        return none("SHMEM was negotiated");
    }
    if case.name != "not-negotiated" && !channel.agreed.shmem {
        return none("SHMEM was not negotiated");
    }
    if size < start + ROOM || size % PAGE != 0 {
        return none("region 0 is too small for it: --region 0=1M");
    }
    if !channel.agreed.reply_ack {
        return none("REPLY_ACK was not negotiated, so the front-end tells nothing");
    }
    let mut trial =
        Trial { name: case.name, channel, start, size, wrong: Vec::new(), unsaid: false, skipped: None };
    let result = (case.run)(&mut trial);
    // A request that got no answer may be the only one.
    let goes_on = match &result {
        Ok(()) | Err(Gone::Silent(_)) => trial.still_works(),
        Err(_) => Ok(()),
    };
    let Trial { wrong, unsaid, skipped, channel, .. } = trial;
    let framing = case.duty == FRAMING;
    let verdict = match (result.as_ref().and(goes_on.as_ref()), wrong.first()) {
        _ if run.is_none() || channel.shared.run() != run => {
            Verdict::None("the device did not run all the time, so the front-end may refuse")
        }
        (_, Some(_)) => Verdict::Wrong(wrong.join("; ")),
        (Err(Gone::Closed), _) if framing => Verdict::LeftOpen,
        (Err(gone), _) => Verdict::Wrong(gone.to_string()),
        (Ok(()), None) => match skipped {
            Some(why) => Verdict::None(why),
            None if unsaid => Verdict::LeftOpen,
            None => Verdict::AsSpecified,
        },
    };
    report.verdict(case.name, &verdict, case.duty);
    match result {
        Err(Gone::Silent(_)) => goes_on,
        result => result.and(goes_on),
    }
}

impl Trial<'_> {
    fn pages(&self, page: u64, pages: u64) -> MMap {
        MMap { shm_offset: self.start + page * PAGE, len: pages * PAGE, ..MMap::default() }
    }

    fn page(&self, page: u64) -> MMap {
        self.pages(page, 1)
    }

    fn line(&self, line: impl std::fmt::Display) {
        self.channel.shared.report.line(format_args!("{}: {line}", self.name));
    }

    fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }

    fn skip(&mut self, why: &'static str) {
        self.skipped = Some(why);
    }

    /// The specification does not say how it has to go.
    fn unsaid(&mut self) {
        self.unsaid = true;
    }

    /// It has to go so.
    fn must(&mut self, what: &str, outcome: Outcome, expected: Outcome) -> &'static str {
        let came = match outcome {
            Outcome::Done => "done",
            Outcome::Refused => "refused",
            Outcome::Unanswered => "not answered",
        };
        if outcome != expected {
            self.wrong(format!("it did not {what}: {came}"));
        }
        came
    }

    fn map(&mut self, request: MMap, fds: &[BorrowedFd<'_>]) -> Result<Outcome, Gone> {
        self.channel.map(self.name, &request, fds)
    }

    fn unmap(&mut self, request: MMap, fds: &[BorrowedFd<'_>]) -> Result<Outcome, Gone> {
        self.channel.unmap(self.name, &request, fds)
    }

    fn must_map(&mut self, request: MMap, fd: BorrowedFd<'_>) -> Result<(), Gone> {
        let outcome = self.map(request, &[fd])?;
        self.must("map", outcome, Outcome::Done);
        Ok(())
    }

    fn must_refuse_map(&mut self, request: MMap, fds: &[BorrowedFd<'_>]) -> Result<(), Gone> {
        let outcome = self.map(request, fds)?;
        self.must("refuse", outcome, Outcome::Refused);
        Ok(())
    }

    fn must_unmap(&mut self, request: MMap) -> Result<(), Gone> {
        let outcome = self.unmap(request, &[])?;
        self.must("unmap", outcome, Outcome::Done);
        Ok(())
    }

    fn must_refuse_unmap(&mut self, request: MMap) -> Result<(), Gone> {
        let outcome = self.unmap(request, &[])?;
        self.must("refuse", outcome, Outcome::Refused);
        Ok(())
    }

    fn maps_and_unmaps(&mut self, request: MMap) -> Result<(), Gone> {
        let file = files::file(2, request.fd_offset + request.len)?;
        self.must_map(request, file.as_fd())?;
        self.must_unmap(request)
    }

    /// MAPs of a good file that all have to be refused.
    fn each_refused(&mut self, requests: &[MMap]) -> Result<(), Gone> {
        let file = files::file(2, 4 * PAGE)?;
        requests.iter().try_for_each(|request| self.must_refuse_map(*request, &[file.as_fd()]))
    }

    /// A MAP of a one-page file, and its UNMAP where it succeeds: that has to succeed, too.
    fn may_map(&mut self, request: MMap) -> Result<(), Gone> {
        let file = files::file(2, PAGE)?;
        let outcome = self.map(request, &[file.as_fd()])?;
        self.unsaid();
        match outcome {
            Outcome::Done => self.must_unmap(request),
            _ => Ok(()),
        }
    }

    /// UNMAPs that all have to be refused while pages 1 to 3 are mapped.
    fn unmaps_refused(&mut self, requests: &[MMap]) -> Result<(), Gone> {
        let file = files::file(2, 3 * PAGE)?;
        self.must_map(self.pages(1, 3), file.as_fd())?;
        for request in requests {
            self.must_refuse_unmap(*request)?;
        }
        self.must_unmap(self.pages(1, 3))
    }

    /// Takes away what the case left behind; then a MAP has to work as ever.
    fn still_works(&mut self) -> Result<(), Gone> {
        self.channel.clean_up()?;
        if !self.channel.agreed.shmem {
            return Ok(());
        }
        let file = files::file(3, PAGE)?;
        let request = self.page(0);
        let (mapped, _) = self.channel.quiet_map(&request, &[file.as_fd()])?;
        let (unmapped, _) = match mapped {
            Outcome::Done => self.channel.quiet_unmap(&request, &[])?,
            _ => (Outcome::Refused, 0),
        };
        self.must("map and unmap a page afterwards", unmapped, Outcome::Done);
        Ok(())
    }
}
