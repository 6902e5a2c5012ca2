//! The vhost-user protocol, front-end side: messages, sockets, negotiation, requests in both directions.
//!
//! It uses nothing else of hotslot: it gets sockets, numbers and a [`channel::Handler`], and knows neither
//! guest memory nor virtio devices nor threads.
//!
//! Reading order: [`message`] (bytes), [`connection`] (one socket), [`negotiate`] (what is agreed),
//! [`frontend`] (our requests on the main socket), [`channel`] (the back-end's requests on the other one),
//! [`observer`] (what both tell of each message, for a trace).

pub mod channel;
pub mod connection;
pub mod frontend;
pub mod message;
pub mod negotiate;
pub mod observer;
