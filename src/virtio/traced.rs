//! A device's register block that records the guest's accesses (`--trace-vhost-user`): `vmm::backends` puts
//! it on the bus in place of the [`MmioTransport`].
//!
//! Most reads, QueueNotify and InterruptACK do not come here: KVM serves them without an exit.

use std::sync::Arc;
use std::time::Instant;

use super::mmio::MmioTransport;
use super::register_page::{CONFIG_START, Register};
use crate::bus::BusDevice;
use crate::exit::Exit;
use crate::trace::record::{Access, ReadOrWrite, What};
use crate::trace::recorder::Recorder;

/// The registers of a device that is traced.
pub struct TracedRegisters {
    transport: Arc<MmioTransport>,
    recorder: Recorder,
}

impl TracedRegisters {
    /// In front of this transport.
    pub fn new(transport: Arc<MmioTransport>, recorder: Recorder) -> Arc<Self> {
        Arc::new(TracedRegisters { transport, recorder })
    }

    fn record(
        &self,
        began: Instant,
        access: ReadOrWrite,
        offset: u64,
        data: &[u8],
        shows: Option<u64>,
        reason: Option<String>,
    ) {
        let register = match Register::at(offset) {
            Some(register) => format!("{register:?}"),
            None if offset >= CONFIG_START as u64 => "Config".to_owned(),
            None => "?".to_owned(),
        };
        let (width, value) = (data.len(), number(data));
        let access = Access { access, register, offset, width, value, shows, reason };
        self.recorder.ended(began, What::Register(access));
    }
}

impl BusDevice for TracedRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let began = Instant::now();
        self.transport.read(offset, data);
        self.record(began, ReadOrWrite::Read, offset, data, None, None);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<Exit> {
        let began = Instant::now();
        let misuse = self.transport.carry_out(offset, data).err();
        // What the driver may read to see whether its write was accepted.
        let answers = matches!(Register::at(offset), Some(Register::Status | Register::QueueReady));
        let shows = answers.then(|| {
            let mut shown = [0; 4];
            self.transport.read(offset, &mut shown);
            number(&shown)
        });
        let reason = misuse.map(|misuse| misuse.to_string());
        self.record(began, ReadOrWrite::Write, offset, data, shows, reason);
        None
    }
}

/// Up to 8 bytes, little endian.
fn number(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
