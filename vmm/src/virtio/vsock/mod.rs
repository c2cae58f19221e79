//! virtio-vsock (virtio 1.3 §5.10), stream sockets only, mapped to one listening Unix socket.
//!
//! The host dials: a client connects to the Unix socket, writes `CONNECT <port>\n`, and once the
//! guest has accepted reads `OK <host port>\n` and then the guest's bytes. The guest can open no
//! conversation: its requests are answered by RST, and the one to
//! [`READY_PORT`](bulkhead_proto::guest::READY_PORT) says that it listens.
//!
//! | file | what | knows |
//! |---|---|---|
//! | `packet.rs` | headers in and out | bytes |
//! | `credit.rs` | flow control both ways | numbers |
//! | `handshake.rs` | the CONNECT line | bytes |
//! | `connection.rs` | one stream: its state, buffer and credit | a Unix stream |
//! | `muxer.rs` | all streams, who may send next | connections |
//! | `device.rs` | transport and rings; watches descriptors | the muxer |
//!
//! Streams are watched edge-triggered: a connection remembers that its client has bytes to read
//! and reads them when the guest has given both a buffer and credit.

mod connection;
mod credit;
mod device;
mod handshake;
mod muxer;
mod packet;
#[cfg(test)]
mod suspend_tests;
#[cfg(test)]
mod tests;

pub use device::{OnReady, VsockDevice, VsockError};

/// The host's context id (§5.10.4).
const HOST_CID: u64 = 2;

/// Bytes of the guest that are kept for a client that doesn't read: what the guest is told as
/// buf_alloc for each connection (§5.10.6.3).
const CLIENT_BUFFER: u32 = 128 << 10;

/// Connections at a time, those that wait for the guest included.
const MAX_CONNECTIONS: usize = 1024;
