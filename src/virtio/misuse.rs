//! The writes to virtio-mmio registers that a driver must not make (VIRTIO 1.3, section 4.2.2). `super::mmio`
//! refuses and logs it.

use thiserror::Error;

use super::queue::BadQueue;
use super::status;

/// A write that the driver must not make, and what is wrong with it. It changed nothing, except where a
/// register tells the driver so.
#[derive(Debug, Error)]
pub(super) enum Misuse {
    #[error("a control register takes aligned writes of 4 bytes, not {0}")]
    Width(usize),
    #[error("no register is there")]
    NoRegister,
    #[error("the register is read-only")]
    ReadOnly,
    #[error("{0}")]
    Status(#[from] status::Refused),
    #[error("features are accepted between DRIVER and FEATURES_OK")]
    FeaturesNotNow,
    #[error("FEATURES_OK stays clear: the accepted features {accepted:#x}{} are not all among {offered:#x}", if *.beyond { " and some above bit 63" } else { "" })]
    NotOffered { accepted: u64, beyond: bool, offered: u64 },
    #[error("FEATURES_OK stays clear: VIRTIO_F_VERSION_1 is not among the accepted features {0:#x}")]
    NoVersion1(u64),
    #[error("FEATURES_OK stays clear: {0}")]
    NotTaken(String),
    #[error("the device needs a reset; until then neither FEATURES_OK nor QueueReady can be set")]
    Broken,
    #[error("the driver gave up on the device")]
    GaveUp,
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("queues are set up after FEATURES_OK")]
    QueueTooEarly,
    #[error("after DRIVER_OK a queue is enabled only where VIRTIO_F_RING_RESET was negotiated")]
    QueueTooLate,
    #[error("queue {0} is ready, so it cannot be changed")]
    QueueIsReady(u16),
    #[error("QueueReady stays 0: {0}")]
    Queue(#[from] BadQueue),
    #[error("the register takes 0 or 1")]
    NotABit,
    #[error("VIRTIO_F_RING_RESET was not negotiated")]
    NoRingReset,
    #[error("queue {0} is not enabled, so there is nothing to reset")]
    QueueNotEnabled(u16),
    #[error("the bits {0:#x} are not defined")]
    UndefinedBits(u32),
    #[error("the configuration space is written after FEATURES_OK")]
    ConfigTooEarly,
}
