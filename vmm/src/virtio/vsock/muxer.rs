//! All connections of a device: which packet belongs to which, who may send next, who waits.

use super::MAX_CONNECTIONS;
use super::connection::{Connection, Fate, Turn, stray_reset};
use super::packet::{GuestPacket, HostPacket, Malformed, Op, Ports, TYPE_STREAM};
use crate::virtio::buffers::Segments;
use bulkhead_proto::guest::READY_PORT;
use event_manager::EventSet;
use nix::sys::socket::{SockFlag, accept4};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// First host port given away; the lower ones look like well-known ports.
pub const FIRST_HOST_PORT: u32 = 1 << 30;
/// RSTs kept for a guest that gives no buffers; more are dropped, as a network would.
const MAX_STRAY_RESETS: usize = 256;
/// After so long, a silent peer's connection makes room for another one when all are taken.
const SILENCE: Duration = Duration::from_secs(30);

/// What the owner of the descriptors has to do.
#[derive(Debug)]
pub enum Watch {
    /// Watch a new connection's socket, edge-triggered.
    Add {
        /// The connection's host port.
        host_port: u32,
        /// Its socket.
        fd: RawFd,
    },
    /// Stop watching the socket, then close it.
    Remove(UnixStream),
}

/// All connections.
#[derive(Debug)]
pub struct Muxer {
    listener: UnixListener,
    /// The listener may have more clients; it is watched edge-triggered.
    clients_wait: bool,
    /// The last attempt to accept a client failed, and the log says so.
    accept_failed: bool,
    /// By host port.
    connections: BTreeMap<u32, Connection>,
    next_host_port: u32,
    guest_ready: bool,
    /// No client is taken any more.
    closed: bool,
    /// Those with something to say, in the order of their turns, each at most once.
    turns: VecDeque<u32>,
    stray_resets: VecDeque<HostPacket>,
    watches: Vec<Watch>,
}

impl Muxer {
    /// No connections; `listener` is non-blocking. Host ports begin at `first_host_port`, which is
    /// at least [`FIRST_HOST_PORT`]. With `guest_ready` clients are connected at once.
    pub fn new(listener: UnixListener, first_host_port: u32, guest_ready: bool) -> Self {
        Muxer {
            listener,
            clients_wait: true,
            accept_failed: false,
            connections: BTreeMap::new(),
            next_host_port: first_host_port,
            guest_ready,
            closed: false,
            turns: VecDeque::new(),
            stray_resets: VecDeque::new(),
            watches: Vec::new(),
        }
    }

    /// From now on clients wait in the listener's backlog, if there is nothing left to say to the
    /// guest and nobody to say it; otherwise what there is.
    pub fn close(&mut self) -> Result<(), String> {
        match (self.connections.len(), self.stray_resets.len()) {
            (0, 0) => {
                self.closed = true;
                Ok(())
            }
            (0, _) => Err("the guest has not taken all resets".into()),
            (1, _) => Err("1 connection is open".into()),
            (count, _) => Err(format!("{count} connections are open")),
        }
    }

    /// Ends all connections, as a driver's reset does.
    pub fn into_listener(self) -> UnixListener {
        self.listener
    }

    /// The listener's descriptor.
    pub fn listener_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// Descriptors to watch or not to watch since the last call.
    pub fn take_watches(&mut self) -> Vec<Watch> {
        std::mem::take(&mut self.watches)
    }

    /// The listener has new clients.
    pub fn listener_ready(&mut self) {
        self.clients_wait = true;
    }

    /// Takes up to `budget` new clients; true if there may be more.
    pub fn accept(&mut self, budget: usize) -> bool {
        for _ in 0..budget {
            if self.closed || !self.clients_wait || !self.make_room() {
                return false;
            }
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            match accept4(self.listener.as_raw_fd(), flags) {
                Ok(fd) => {
                    // SAFETY: accept4 has just made this descriptor and nobody else owns it.
                    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
                    self.accept_failed = false;
                    self.add(stream);
                }
                Err(nix::Error::EAGAIN) => self.clients_wait = false,
                // That client is gone already.
                Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => {}
                // Out of descriptors or memory: try again when a connection has ended.
                Err(error) => {
                    if !std::mem::replace(&mut self.accept_failed, true) {
                        tracing::warn!(
                            "accepting a vsock client failed: {error}; new clients wait until a \
                             connection ends"
                        );
                    }
                    return false;
                }
            }
        }
        self.clients_wait
    }

    fn make_room(&mut self) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let now = Instant::now();
        let silent = self.connections.iter().find_map(|(&port, connection)| {
            let since = connection.silent_since()?;
            (now.saturating_duration_since(since) > SILENCE).then_some(port)
        });
        match silent {
            Some(port) => {
                self.evict(port);
                true
            }
            None => false,
        }
    }

    fn evict(&mut self, host_port: u32) {
        let known = self
            .connections
            .get(&host_port)
            .is_some_and(Connection::known_to_guest);
        if let Some(ports) = self.remove(host_port)
            && known
        {
            self.stray_reset(ports, TYPE_STREAM);
        }
    }

    fn add(&mut self, stream: UnixStream) {
        // Ends, as there are fewer connections than ports.
        while self.connections.contains_key(&self.next_host_port) {
            self.advance_host_port();
        }
        let host_port = self.next_host_port;
        self.advance_host_port();
        self.watches.push(Watch::Add {
            host_port,
            fd: stream.as_raw_fd(),
        });
        self.connections
            .insert(host_port, Connection::new(host_port, stream));
    }

    fn advance_host_port(&mut self) {
        self.next_host_port = self
            .next_host_port
            .checked_add(1)
            // 2^32-1 is VMADDR_PORT_ANY.
            .filter(|&port| port != u32::MAX)
            .unwrap_or(FIRST_HOST_PORT);
    }

    /// Something has happened on a connection's socket.
    pub fn client_event(&mut self, host_port: u32, events: EventSet) {
        self.with(host_port, |connection| {
            let mut fate = Fate::Keep;
            if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
                fate = connection.client_readable();
            }
            if fate == Fate::Keep && events.contains(EventSet::OUT) {
                fate = connection.client_writable();
            }
            if fate == Fate::Keep && events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                fate = connection.client_gone();
            }
            fate
        });
    }

    /// Lets `call` work on a connection, then removes it or gives it its turn.
    fn with(&mut self, host_port: u32, call: impl FnOnce(&mut Connection) -> Fate) {
        let Some(connection) = self.connections.get_mut(&host_port) else {
            return;
        };
        if call(connection) == Fate::Remove {
            self.remove(host_port);
            return;
        }
        if self.guest_ready {
            connection.guest_ready();
        }
        if connection.has_turn() && !self.turns.contains(&host_port) {
            self.turns.push_back(host_port);
        }
    }

    fn remove(&mut self, host_port: u32) -> Option<Ports> {
        let connection = self.connections.remove(&host_port)?;
        self.turns.retain(|&port| port != host_port);
        let ports = connection.ports();
        self.watches.push(Watch::Remove(connection.into_stream()));
        Some(ports)
    }

    fn stray_reset(&mut self, ports: Ports, kind: u16) {
        if self.stray_resets.len() < MAX_STRAY_RESETS {
            self.stray_resets.push_back(stray_reset(ports, kind));
        }
    }

    /// A packet of the guest's. True if it was the first knock at [`READY_PORT`].
    pub fn guest_packet(
        &mut self,
        packet: Result<GuestPacket, Malformed>,
        mem: &GuestMemoryMmap,
    ) -> bool {
        let packet = match packet {
            Ok(packet) => packet,
            Err(Malformed::Drop) => return false,
            Err(Malformed::Reset(ports, kind)) => {
                if self.known(ports) {
                    self.remove(ports.host);
                }
                self.stray_reset(ports, kind);
                return false;
            }
        };
        if self.known(packet.ports) {
            self.with(packet.ports.host, |connection| {
                connection.guest_packet(&packet, mem)
            });
            return false;
        }
        if packet.op != Op::Reset {
            self.stray_reset(packet.ports, TYPE_STREAM);
        }
        packet.op == Op::Request && packet.ports.host == READY_PORT && self.becomes_ready()
    }

    fn known(&self, ports: Ports) -> bool {
        self.connections
            .get(&ports.host)
            .is_some_and(|connection| connection.known_to_guest() && connection.ports() == ports)
    }

    fn becomes_ready(&mut self) -> bool {
        if std::mem::replace(&mut self.guest_ready, true) {
            return false;
        }
        let waiting: Vec<u32> = self.connections.keys().copied().collect();
        for host_port in waiting {
            self.with(host_port, |_| Fate::Keep);
        }
        true
    }

    /// Whether there is something to say to the guest.
    pub fn has_packets(&self) -> bool {
        !self.stray_resets.is_empty() || !self.turns.is_empty()
    }

    /// Next packet for the guest; its payload, read from a client, is in `room` already. None if
    /// there was nothing to say after all.
    pub fn next_packet(&mut self, room: &Segments, mem: &GuestMemoryMmap) -> Option<HostPacket> {
        if let Some(packet) = self.stray_resets.pop_front() {
            return Some(packet);
        }
        while let Some(host_port) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&host_port) else {
                continue;
            };
            match connection.turn(room.clone(), mem) {
                Turn::Nothing => {}
                Turn::Last(packet) => {
                    self.remove(host_port);
                    return Some(packet);
                }
                Turn::Packet(packet) => {
                    // Behind all others.
                    if connection.has_turn() {
                        self.turns.push_back(host_port);
                    }
                    return Some(packet);
                }
            }
        }
        None
    }

    /// Ends all connections: their context ids mean nothing after a migration or restore.
    pub fn drop_connections(&mut self) {
        let all: Vec<u32> = self.connections.keys().copied().collect();
        for host_port in all {
            self.remove(host_port);
        }
        self.stray_resets.clear();
    }
}
