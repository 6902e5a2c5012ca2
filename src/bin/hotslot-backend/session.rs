//! The requests of one front-end (vhost-user, "Front-end message types"), as the `vhost` crate decodes them.
//!
//! The `vhost-user-backend` crate has such a handler, too. But it refuses GET_INFLIGHT_FD and
//! SET_INFLIGHT_FD, and can be neither wrapped nor extended. Called by `server` on the thread that serves the
//! front-end.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use crate::device::Device;
use crate::inflight::{self, Inflight};
use crate::queues::Queues;
use crate::ring::{MAX_SIZE, Ring};

/// Regions that a front-end may add: as many as vhost in Linux takes.
const MAX_REGIONS: u64 = 509;

/// A session: what a front-end has said so far.
pub struct Session<D> {
    queues: Arc<Queues<D>>,
    /// Whether the front-end asked for anything. Without that, it only tried whether a back-end listens.
    pub was_asked: bool,
    protocol_features: VhostUserProtocolFeatures,
    /// Where the front-end has the guest's memory.
    regions: Vec<Region>,
    inflight: Option<Inflight>,
}

struct Region {
    front_end: u64,
    guest: u64,
    len: u64,
}

impl<D: Device> Session<D> {
    pub fn of(queues: Arc<Queues<D>>) -> Self {
        Session {
            queues,
            was_asked: false,
            protocol_features: VhostUserProtocolFeatures::empty(),
            regions: Vec::new(),
            inflight: None,
        }
    }

    fn ring(&self, index: usize) -> Result<&Ring> {
        self.queues.ring(index).ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, front_end: u64) -> Result<GuestAddress> {
        let inside = |region: &Region| {
            let offset = front_end.checked_sub(region.front_end).filter(|&offset| offset < region.len)?;
            Some(GuestAddress(region.guest + offset))
        };
        self.regions.iter().find_map(inside).ok_or(Error::InvalidParam)
    }

    /// The front-end told of another memory of the guest. Returns when no request is being answered in the
    /// memory of before. A device with shared memory is the exception: its requests may be waiting for the
    /// front-end, which waits for this. They keep their memory until they are done.
    fn change_memory(&self, mut memory: GuestMemoryMmap) -> Result<()> {
        if self.protocol_features.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
            && memory.find_region(inflight::RINGS).is_none()
        {
            let rings = inflight::rings(self.queues.len()).map_err(Error::ReqHandlerError)?;
            memory = memory.insert_region(Arc::new(rings)).map_err(failed)?;
        }
        self.queues.memory.lock().map_err(|_| Error::BackendInternalError)?.replace(memory);
        self.queues.device.memory_changed(&self.queues.memory).map_err(Error::ReqHandlerError)?;
        if self.queues.device.shared_memory().is_none() {
            self.queues.wait();
        }
        Ok(())
    }

    fn set_enabled(&self, index: usize, enabled: bool) -> Result<()> {
        self.ring(index)?.lock().enabled = enabled;
        self.queues.wake(index);
        Ok(())
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn region(memory: MmapRegion, guest: u64) -> Result<GuestRegionMmap> {
    GuestRegionMmap::new(memory, GuestAddress(guest)).ok_or(Error::InvalidParam)
}

impl<D: Device> VhostUserBackendReqHandlerMut for Session<D> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        (0..self.queues.len()).try_for_each(|index| self.set_enabled(index, false))?;
        self.queues.wait();
        self.queues.device.stop_waiting();
        self.queues.device.reset();
        if let Some(inflight) = &self.inflight {
            inflight.clear();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        self.was_asked = true;
        Ok((1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | self.queues.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        for index in 0..self.queues.len() {
            self.ring(index)?.lock().queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
            // Without the messages that enable a ring, it is enabled. With them it stays as it is.
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                self.set_enabled(index, true)?;
            }
        }
        self.queues.device.acked_features(features);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | self.queues.device.protocol_features();
        if self.queues.device.shared_memory().is_some() {
            features |= VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::SHMEM;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.protocol_features = VhostUserProtocolFeatures::from_bits_retain(features);
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut memory = Vec::new();
        let mut regions = Vec::new();
        for (told, file) in table.iter().zip(files) {
            memory.push(region(told.mmap_region(file)?, told.guest_phys_addr)?);
            regions.push(Region {
                front_end: told.user_addr,
                guest: told.guest_phys_addr,
                len: told.memory_size,
            });
        }
        self.change_memory(GuestMemoryMmap::from_regions(memory).map_err(failed)?)?;
        self.regions = regions;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS)
    }

    fn add_mem_region(
        &mut self,
        told: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let added = Arc::new(region(told.mmap_region(file)?, told.guest_phys_addr)?);
        let memory = self.queues.memory.memory().insert_region(added).map_err(failed)?;
        self.change_memory(memory)?;
        self.regions.push(Region {
            front_end: told.user_addr,
            guest: told.guest_phys_addr,
            len: told.memory_size,
        });
        Ok(None)
    }

    fn remove_mem_region(&mut self, told: &VhostUserSingleMemoryRegion) -> Result<()> {
        let address = GuestAddress(told.guest_phys_addr);
        let removed = self.queues.memory.memory().remove_region(address, told.memory_size);
        self.change_memory(removed.map_err(failed)?.0)?;
        self.regions.retain(|region| region.guest != told.guest_phys_addr);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|&size| size <= MAX_SIZE).ok_or(Error::InvalidParam)?;
        self.ring(index as usize)?.lock().queue.try_set_size(size).map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let [descriptors, used, available] =
            [self.guest_address(descriptors)?, self.guest_address(used)?, self.guest_address(available)?];
        let queue = &mut self.ring(index as usize)?.lock().queue;
        queue.try_set_desc_table_address(descriptors).map_err(|_| Error::InvalidParam)?;
        queue.try_set_avail_ring_address(available).map_err(|_| Error::InvalidParam)?;
        queue.try_set_used_ring_address(used).map_err(|_| Error::InvalidParam)?;
        // The protocol has no message for it.
        let next = queue.used_idx(&*self.queues.memory.memory(), Ordering::Acquire).map_err(failed)?;
        queue.set_next_used(next.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index as usize)?.lock().queue.set_next_avail(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index as usize)?;
        ring.lock().stop();
        self.queues.wake(index as usize);
        self.queues.wait_for(index as usize);
        self.queues.device.stop_waiting();
        let mut ring = ring.lock();
        ring.set_call(None);
        Ok(VhostUserVringState::new(index, ring.queue.next_avail().into()))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let index = usize::from(index);
        // Without it the driver would have to be watched all the time.
        if let Some(kick) = kick {
            let memory = self.queues.memory.memory();
            self.ring(index)?.lock().start(index, &memory, kick).map_err(failed)?;
            self.queues.wake(index);
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        let index = usize::from(index);
        self.ring(index)?.lock().set_call(call);
        self.queues.wake(index);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _: Option<File>) -> Result<()> {
        self.ring(usize::from(index)).map(drop)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.set_enabled(index as usize, enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // The crate has limited both to 4 KiB.
        let rest = self.queues.device.config().into_iter().skip(offset as usize);
        Ok(rest.chain(std::iter::repeat(0)).take(size as usize).collect())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        self.queues.device.write_config(offset, bytes);
        Ok(())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        let has = |feature| self.protocol_features.contains(feature);
        backend.set_reply_ack_flag(has(VhostUserProtocolFeatures::REPLY_ACK));
        backend.set_shmem_flag(has(VhostUserProtocolFeatures::SHMEM));
        self.queues.device.connect(backend);
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        let sizes: Vec<u64> = self.queues.device.shared_memory().into_iter().collect();
        Ok(VhostUserShMemConfig::new(sizes.len() as u32, &sizes))
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let &VhostUserInflight { num_queues, queue_size, .. } = asked;
        let made = Inflight::make(num_queues, queue_size).map_err(Error::ReqHandlerError)?;
        Ok((VhostUserInflight::new(made.1, 0, num_queues, queue_size), made.0))
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        let sizes = (told.num_queues, told.queue_size);
        let inflight = Inflight::map(file, told.mmap_offset, sizes).map_err(Error::ReqHandlerError)?;
        for index in 0..self.queues.len() {
            self.ring(index)?.lock().record = inflight.of(index);
        }
        self.queues.device.keep(inflight.kept());
        self.inflight = Some(inflight);
        Ok(())
    }

    // Not offered.

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}

const NOT_OFFERED: Error = Error::InvalidOperation("not offered");
