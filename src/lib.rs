//! hotslot: a small VMM on KVM (x86-64) that boots a stock Linux kernel. Its virtio-mmio devices have
//! back-ends in other processes (vhost-user). It maps the files that those back-ends send into guest physical
//! memory while the guest runs (protocol feature SHMEM): one KVM memory slot per mapping.
//!
//! This page is the tour of the code. [`contract`] says in numbered assertions what a back-end and a guest
//! may rely on; tests cite the numbers. [`design`] gives the reasons. [`drawings`] shows the processes, the
//! messages and a window. Some modules are private; the tour names them by their file in `src`.
//! `cargo doc --document-private-items` shows them, too.
//!
//! # Reading order: the short path
//!
//! Five stops; then the four stories below make sense.
//!
//! 1. Build: [`vmm::Vmm::build`], the whole set-up in one function (`vmm/build.rs`).
//! 2. Slots: [`memory::GuestMapper`] and [`kvm::slots`], which put host memory into the guest.
//! 3. The backend channel: `vhost_user/wire/channel.rs` (requests of the back-end),
//!    `vhost_user/shmem_handler.rs`.
//! 4. Map: `memory/ledger.rs` (may this be mapped, and where), `memory/shmem.rs` (map it, or undo it).
//! 5. Reset: `write_status` and `reset` of [`virtio::mmio`], then `reset` in `vhost_user/device.rs`.
//!
//! # Reading order: the long path
//!
//! 1. [`vmm`]: `build.rs`, `run.rs`, `backends.rs` (connect, attach); then the rest of the table in `vmm.rs`.
//! 2. [`bus`]: how an access of the guest finds its device.
//! 3. [`kvm`]: the machine, its memory slots, its vCPUs and their exits.
//! 4. [`arch`]: the address layout, kernel formats, boot, and what the kernel is told (CPUID, MSRs, ACPI).
//! 5. [`memory`]: RAM; windows; mappings in shared memory regions, with every check of the contract; missing
//!    pages.
//! 6. [`virtio`]: the device trait; registers as a page of memory; `status.rs` (Status), `queue.rs` (queues),
//!    `kind.rs` (device types).
//! 7. [`vhost_user`]: `wire/` (message, connection, negotiate, frontend, channel), then connect, link,
//!    shmem_handler, watch, device, sharing.
//! 8. [`devices`]: serial port, power, reset, panic, debug exit.
//! 9. [`cli`], [`config`], [`exit`], [`report`], [`terminal`], [`thread`], [`size`]: the program around it.
//!
//! # Which module may use which
//!
//! ```text
//!   main ─▶ cli ─▶ config ─▶ virtio (kind)
//!     └───▶ vmm ─▶ everything
//!           vhost_user ─▶ virtio, memory, config    (its wire/ uses nothing of ours)
//!                         virtio ─▶ memory, bus
//!           kvm ─▶ memory, bus       devices ─▶ bus       arch ─▶ memory
//!                  memory, bus ─▶ nothing of ours
//!           exit, report, size, thread: for every module
//! ```
//!
//! `tests/house.rs` checks this, and that no files import each other in a circle. The one inversion is
//! [`memory::GuestMapper`] ("put this host memory at this guest address, read-only or not; take it away"):
//! [`kvm::slots`] implements it, and tests record calls with a fake. So `memory` and `vhost_user` never use
//! `kvm`.
//!
//! # Four stories
//!
//! **Boot**: [`vmm::Vmm::build`], on the main thread, then `Vmm::run`.
//!
//! 1. Check the numbers; make RAM; open kernel and initramfs, check them, and plan their places in RAM.
//! 2. Open KVM, check its capabilities, make the machine; add a slot for RAM.
//! 3. For each back-end: connect, negotiate, learn the sizes of its shared memory regions, reserve their
//!    windows.
//! 4. Attach the serial port and power control.
//! 5. Attach each device: register page, interrupt (irqfd), backend channel, doorbells (ioeventfds), slot for
//!    the page.
//! 6. Write ACPI tables, kernel, initramfs and boot parameters into RAM. Make the vCPUs, with their state as
//!    data.
//! 7. Run: block the signals, make the terminal raw, start a thread for each vCPU, serve the main loop until
//!    the end.
//!
//! **A register access**: [`virtio::mmio`]. A guest's read is a read of the register page's memory: no exit.
//! A write is a KVM_EXIT_MMIO on the vCPU's thread, with the address and the value:
//!
//! 1. [`bus::Bus`] finds the device by the address, unlocks itself, and calls the device.
//! 2. The transport finds the register by its name and calls the register's handler.
//! 3. The handler tells the device and rewrites the page; then the vCPU goes on.
//!
//! Two writes do not exit to user space: QueueNotify and the acknowledgement of a used buffer are ioeventfds.
//!
//! **A mapping**: the back-end sends SHMEM_MAP, and the device's own thread (`vhost_user/watch.rs`) serves
//! it.
//!
//! 1. One recvmsg brings the message and its descriptor. A request that was begun before the last reset is
//!    refused.
//! 2. `wire/channel.rs` checks the message: SHMEM negotiated, 40 bytes, exactly one descriptor, known flags.
//! 3. `memory/ledger.rs` checks the request: gate open, region known, length not 0, offsets whole pages,
//!    inside the region, inside the greatest size of a file, no overlap, quota.
//! 4. [`memory::window`] maps the file somewhere and moves the mapping into the window.
//! 5. [`kvm::slots`] adds the slot: now the guest sees the file. The ledger records the mapping.
//! 6. With `share-shmem=on`, the recipients are told (`vhost_user/sharing`). Else the descriptor is closed.
//! 7. The answer is 0, where the back-end asked for one. A step that fails undoes those before it; the answer
//!    is -errno.
//!
//! **A reset**: the driver writes 0 to Status. The vCPU's thread does everything before the write completes.
//!
//! 1. [`virtio::mmio`] decodes the write and calls `reset` of the device.
//! 2. The device closes the gate: from now on MAP is refused.
//! 3. It sends GET_VRING_BASE for each ring that runs, then RESET_DEVICE and SET_STATUS 0 where negotiated.
//! 4. It drains the backend channel: requests that are queued there are answered.
//! 5. It deletes every slot, reserves the windows again, and waits until the recipients have let go.
//! 6. [`virtio::mmio`] forgets queues, features, selectors and old kicks, and clears InterruptStatus and
//!    Status.
//!
//! The gate opens with the first message of the next start.
//!
//! # Glossary
//!
//! One word has one meaning in all files.
//!
//! | word | meaning |
//! |---|---|
//! | back-end, front-end | the two sides of vhost-user: the process that serves a device; the VMM, here |
//! | backend channel | the second socket of a device: the back-end sends requests and we answer |
//! | call | the eventfd that a back-end signals after it used a buffer; KVM interrupts the guest (irqfd) |
//! | DAX | direct access: the guest's file system maps a file's pages themselves and keeps no copy |
//! | descriptor | a file descriptor. An entry of a virtqueue is a ring descriptor, in the descriptor table |
//! | doorbell | an address in the register page where a guest's write signals an eventfd (ioeventfd) |
//! | eventfd | a counter with a descriptor: one process adds to it and another waits for it |
//! | gap | the guest addresses from 3 GiB to 4 GiB, which have no RAM but registers |
//! | gate | whether a device takes SHMEM_MAP now: closed by a reset, opened by the next start |
//! | GSI | global system interrupt: the number of an interrupt line of the guest |
//! | hole | a part of a region without a mapping: the guest reads all-ones there |
//! | initramfs | the archive of files that a kernel unpacks into memory and starts its first program from |
//! | ioeventfd | KVM signals an eventfd at a guest's write to an address, instead of an exit to the VMM |
//! | irqfd | KVM interrupts the guest when an eventfd is signalled |
//! | kick | the eventfd of a queue: signalled when the driver made a buffer available, read by the back-end |
//! | main socket | the first socket of a device: we send requests and the back-end answers |
//! | mapping | a part of a file at an offset in a window: SHMEM_MAP makes it, SHMEM_UNMAP removes it |
//! | memfd | a file that exists in memory only and can be sent to other processes, such as the guest's RAM |
//! | MMIO | memory-mapped I/O: device registers at memory addresses |
//! | nested | a guest that is itself a host: KVM in a virtual machine |
//! | owner, recipient | a device whose mappings others see (`share-shmem=on`); a device that sees them |
//! | page cache | the pages of files that a kernel keeps in memory; a shared mapping (mmap) shows them |
//! | region, shmid | a shared memory region: guest addresses of a device; its id (VIRTIO 1.3, section 2.10) |
//! | slot | KVM's unit of guest memory: a guest address range and the host memory behind it |
//! | span | a part of a window, in whole pages |
//! | transport | the registers between driver and device, here virtio-mmio (`virtio/mmio.rs`) |
//! | unclaimed | an access of the guest that no device and no memory answers |
//! | vCPU | a virtual processor of the guest: a thread of the VMM that calls KVM_RUN |
//! | virtqueue, vring | a queue of buffers between driver and device in guest RAM; vhost-user says vring |
//! | VM exit | the processor leaves the guest; where KVM cannot handle that alone, KVM_RUN returns: an exit |
//! | window | a region together with the host addresses reserved for it, of the same size |

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

#[doc = include_str!("drawings.md")]
pub mod drawings {}
