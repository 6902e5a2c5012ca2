//! hotslot: a small VMM on KVM (x86-64) that boots a stock Linux kernel, gives it virtio-mmio devices whose
//! back-ends are other processes (vhost-user), and maps what those hand over, file by file, into guest
//! physical memory while the guest runs (protocol feature SHMEM): one KVM memory slot per mapping.
//!
//! [`contract`] says, in numbered assertions, what a back-end and a guest can rely on; tests cite the
//! numbers. [`design`] says why things are as they are. This page is the tour of the code.
//!
//! # Reading order
//!
//! 1. [`vmm`]: the story, build → run → shut down. Start at [`vmm::Vmm::build`].
//! 2. [`bus`]: how an access of the guest finds its device.
//! 3. [`kvm`]: the machine, its memory slots, its processors and their exits.
//! 4. [`arch`]: where everything is, how a kernel is loaded, what it is told (CPUID, MSRs, ACPI).
//! 5. [`memory`]: RAM; windows and mappings of shared memory regions, with every check of the contract.
//! 6. [`virtio`]: what a device is; its registers as a page of memory; Status.
//! 7. [`vhost_user`]: the wire, the two sockets, what is agreed, our requests, the back-end's requests, who
//!    sees whose mappings.
//! 8. [`devices`]: serial port, power, reset, panic, debug exit.
//! 9. [`cli`], [`config`], [`exit`], [`report`], [`terminal`], [`thread`], [`size`]: the program around it.
//!
//! # Who may use whom
//!
//! ```text
//!   main ─▶ cli ─▶ config ─▶ vhost_user        (the device string names a vhost_user::kind)
//!     └───▶ vmm ─▶ everything
//!           vhost_user ─▶ virtio, memory       (never kvm: it maps through memory::GuestMapper)
//!                         virtio ─▶ memory, bus
//!           kvm ─▶ memory, bus       devices ─▶ bus       arch ─▶ memory
//!                  memory, bus ─▶ nothing of ours
//!           report, thread, size: for whoever needs them
//! ```
//!
//! `tests/house.rs` reads the `use` lines and keeps it so. The one inversion is [`memory::GuestMapper`] ("put
//! this host memory at this guest address, read-only or not; take it away"): [`kvm::slots`] implements it,
//! tests record with a fake.
//!
//! # Four stories
//!
//! **Boot** ([`vmm::Vmm::build`]): configuration → kernel and initramfs opened and checked → KVM and its
//! capabilities → RAM and its slots → connect and negotiate with each back-end (the sizes of shared memory
//! regions become known) → windows placed → serial port, power → virtio devices: register page, interrupt,
//! doorbells → ACPI tables → kernel, initramfs and boot parameters loaded → vCPUs with their state as data →
//! raw terminal → go.
//!
//! **A register access** ([`virtio::mmio`]): a read is a read of memory, no exit. A write is a KVM_EXIT_MMIO
//! → [`bus::Bus`] (find, unlock) → the register by name → the device → the page rewritten. QueueNotify and
//! the acknowledgement of a used buffer are ioeventfds: no exit to user space either.
//!
//! **A mapping** ([`vhost_user::backend_channel`]): message and descriptor in one recvmsg → negotiated? →
//! region, page, overflow, bounds, overlap, quota ([`memory::shmem`]) → mmap, moved into the window
//! ([`memory::window`]) → slot ([`kvm::slots`]) → recorded → other back-ends told, if asked for
//! ([`vhost_user::sharing`]) → answer 0. Each failure undoes in reverse and answers -errno.
//!
//! **A reset** ([`vhost_user::device`]): Status = 0 → gate closed → GET_VRING_BASE for each ring →
//! RESET_DEVICE or SET_STATUS 0 where negotiated → channel drained → slots gone, window reserved again →
//! others have let go → transport cleared → the write completes. The gate opens with the first message of the
//! next start.
//!
//! # Glossary
//!
//! | word | meaning |
//! |---|---|
//! | back-end, front-end | the two ends of vhost-user: the process that is a device, and the VMM (here) |
//! | backend channel | the second socket, on which the back-end asks and we answer |
//! | main socket | the first one, on which we ask and the back-end answers |
//! | shared memory region, shmid | a range of guest physical memory that belongs to a device, and its id, 0 to 255 (VIRTIO 1.3, section 2.10) |
//! | window | a region together with the host addresses reserved for it, of the same size |
//! | mapping | a part of a file, at an offset in a window: what SHMEM_MAP makes and SHMEM_UNMAP takes away |
//! | owner, recipient | a device whose mappings others see (`share-shmem=on`), and one whose back-end sees them |
//! | hole | a part of a region without a mapping: the guest reads all-ones there |
//! | slot | KVM's unit of guest memory: a guest physical range and the host memory behind it |
//! | gate | whether a device takes SHMEM_MAP now: not between a reset and the next start |
//! | doorbell | an address where a guest's write signals an eventfd |
//! | call, kick | the eventfds of vhost-user: a used buffer for the guest, an available one for the back-end |

pub mod arch;
pub mod bus;
pub mod cli;
pub mod config;
pub mod devices;
pub mod exit;
pub mod kvm;
pub mod memory;
pub mod report;
pub mod size;
pub mod terminal;
pub mod thread;
pub mod vhost_user;
pub mod virtio;
pub mod vmm;

#[doc = include_str!("contract.md")]
pub mod contract {}

#[doc = include_str!("design.md")]
pub mod design {}
