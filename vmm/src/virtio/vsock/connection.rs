//! One stream between a client's Unix socket and a port of the guest.
//!
//! ```text
//!             line read, guest ready      RESPONSE: OK is written
//! Handshake ───► Waiting ───► Requested ─────────► Established
//!     │             │             │ RST                 │ both directions shut, by
//!     ▼             ▼             ▼                     ▼ either side or by both
//!  (removed)    (removed)     (removed)     Lingering ──RST──► (removed)
//! ```
//!
//! Each direction ends by itself: the client's end of file becomes SHUTDOWN(SEND), the guest's
//! SHUTDOWN(SEND) becomes shutdown(2) of the client's reading side once all bytes before it were
//! written.

use super::super::buffers::Segments;
use super::super::iovec::IoVectors;
use super::credit::{ReceiveWindow, SendWindow};
use super::handshake::{Handshake, Progress, answer};
use super::packet::{
    Credit, GuestPacket, HostPacket, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;
use vm_memory::GuestMemoryMmap;

/// Where a connection stands.
#[derive(Debug)]
enum State {
    /// The client has not yet said where to.
    Handshake(Handshake),
    /// For the guest to be ready.
    Waiting,
    /// For the guest's answer.
    Requested,
    /// Bytes flow.
    Established,
    /// The guest was told that all is over and has yet to agree; the client is gone.
    Lingering,
    /// All is over for the guest; the client has yet to take the last bytes.
    Draining,
}

/// What is left to say to the guest.
#[derive(Debug, Default)]
struct Pending {
    request: bool,
    reset: bool,
    /// Flags of a SHUTDOWN.
    shutdown: u32,
    credit_update: bool,
}

/// What a connection has to say when it is its turn.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// This packet; its payload is in the buffer already.
    Packet(HostPacket),
    /// This packet, and the connection is over.
    Last(HostPacket),
    /// Nothing.
    Nothing,
}

/// Whether a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It does.
    Keep,
    /// It is over and the guest knows it or needn't.
    Remove,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    state: State,
    /// When the state was entered that a silent peer could keep for ever.
    since: Instant,
    client: Client,
    receive: ReceiveWindow,
    send: SendWindow,
    credit_requested: bool,
    pending: Pending,
    /// Directions that the guest has shut, as flags of SHUTDOWN from its side.
    guest_shut: u32,
    /// Directions that the guest was told to be shut on our side.
    host_shut: u32,
}

/// The Unix socket and what is known of it.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// The guest's bytes that the client has not yet taken, at most
    /// [`CLIENT_BUFFER`](super::CLIENT_BUFFER).
    buffer: VecDeque<u8>,
    /// Bytes or an end may be there to be read.
    readable: bool,
    /// Neither reads nor writes any more.
    gone: bool,
}

impl Connection {
    /// A client has connected; `host_port` is its name from now on. The stream is non-blocking.
    pub fn new(host_port: u32, stream: UnixStream) -> Self {
        Connection {
            ports: Ports {
                host: host_port,
                guest: 0,
            },
            state: State::Handshake(Handshake::default()),
            since: Instant::now(),
            client: Client {
                stream,
                buffer: VecDeque::new(),
                readable: false,
                gone: false,
            },
            receive: ReceiveWindow::default(),
            send: SendWindow::default(),
            credit_requested: false,
            pending: Pending::default(),
            guest_shut: 0,
            host_shut: 0,
        }
    }

    /// Both ports; the guest's is 0 until the client has named it.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Since when a peer is awaited that may never answer; none for a working connection.
    pub fn silent_since(&self) -> Option<Instant> {
        match self.state {
            State::Handshake(_) | State::Requested | State::Lingering | State::Draining => {
                Some(self.since)
            }
            State::Waiting | State::Established => None,
        }
    }

    /// Whether the guest knows of this connection.
    pub fn known_to_guest(&self) -> bool {
        match self.state {
            State::Handshake(_) | State::Waiting | State::Draining => false,
            State::Requested => !self.pending.request,
            State::Established | State::Lingering => true,
        }
    }

    /// Gives the socket up.
    pub fn into_stream(self) -> UnixStream {
        self.client.stream
    }

    /// The guest has become ready, or has been for long.
    pub fn guest_ready(&mut self) {
        if matches!(self.state, State::Waiting) {
            self.enter(State::Requested);
            self.pending.request = true;
        }
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.since = Instant::now();
    }

    /// The socket has something to read, an end among it.
    pub fn client_readable(&mut self) -> Fate {
        let State::Handshake(handshake) = &mut self.state else {
            self.client.readable = true;
            return Fate::Keep;
        };
        match handshake.read(self.client.stream.as_fd()) {
            Progress::Incomplete => Fate::Keep,
            Progress::Failed => Fate::Remove,
            Progress::Port(port) => {
                self.ports.guest = port;
                self.enter(State::Waiting);
                // What came with the line was not announced by an event of its own.
                self.client.readable = true;
                Fate::Keep
            }
        }
    }

    /// The client takes bytes again.
    pub fn client_writable(&mut self) -> Fate {
        if matches!(self.state, State::Established | State::Draining) {
            self.flush();
        }
        self.unless_drained()
    }

    fn unless_drained(&self) -> Fate {
        if matches!(self.state, State::Draining) && self.client.buffer.is_empty() {
            Fate::Remove
        } else {
            Fate::Keep
        }
    }

    /// The client has closed its socket altogether.
    pub fn client_gone(&mut self) -> Fate {
        self.client.gone = true;
        self.client.readable = true;
        match self.state {
            _ if !self.known_to_guest() => return Fate::Remove,
            State::Requested => self.reset(),
            State::Established => {
                self.drop_buffer();
                // Otherwise what the client has left to read comes first.
                if !self.wants_to_read() {
                    self.pending.shutdown |= SHUTDOWN_BOTH;
                }
            }
            _ => {}
        }
        Fate::Keep
    }

    /// Ends the connection by an RST at the next turn.
    pub fn reset(&mut self) {
        self.pending.reset = true;
    }

    /// Whether there is something to say to the guest.
    pub fn has_turn(&self) -> bool {
        if matches!(self.state, State::Draining) {
            return false;
        }
        self.pending.reset
            || self.pending.request
            || self.shutdown_due() != 0
            || self.pending.credit_update
            || (self.wants_to_read() && (self.send.free() > 0 || !self.credit_requested))
    }

    fn wants_to_read(&self) -> bool {
        self.client.readable
            && matches!(self.state, State::Established)
            && self.host_shut & SHUTDOWN_SEND == 0
            && self.pending.shutdown & SHUTDOWN_SEND == 0
            && self.guest_shut & SHUTDOWN_RECEIVE == 0
    }

    fn shutdown_due(&self) -> u32 {
        self.pending.shutdown & !self.host_shut
    }

    /// Says the most urgent thing; a payload is read into `room` directly.
    pub fn turn(&mut self, room: Segments, mem: &GuestMemoryMmap) -> Turn {
        if self.pending.reset {
            return Turn::Last(self.packet(Op::Reset));
        }
        if std::mem::take(&mut self.pending.request) {
            return Turn::Packet(self.packet(Op::Request));
        }
        if self.wants_to_read() {
            if self.send.free() > 0 {
                if let Some(len) = self.read_client(room, mem) {
                    self.send.send(len);
                    let mut packet = self.packet(Op::ReadWrite);
                    packet.len = len;
                    return Turn::Packet(packet);
                }
            } else if !self.credit_requested {
                self.credit_requested = true;
                return Turn::Packet(self.packet(Op::CreditRequest));
            }
        }
        let flags = self.shutdown_due();
        if flags != 0 {
            self.host_shut |= flags;
            if self.host_shut == SHUTDOWN_BOTH {
                self.enter(State::Lingering);
            }
            let mut packet = self.packet(Op::Shutdown);
            packet.flags = self.host_shut;
            return Turn::Packet(packet);
        }
        if self.pending.credit_update {
            return Turn::Packet(self.packet(Op::CreditUpdate));
        }
        Turn::Nothing
    }

    /// Every packet tells our credit, so an update that is due is done by any.
    fn packet(&mut self, op: Op) -> HostPacket {
        self.pending.credit_update = false;
        HostPacket::new(self.ports, op, self.receive.tell())
    }

    /// Reads as much as buffer and credit allow; none if the client has nothing now or no more.
    fn read_client(&mut self, mut room: Segments, mem: &GuestMemoryMmap) -> Option<u32> {
        let slices = room.take_front(self.send.free() as usize).slices(mem);
        loop {
            match IoVectors::new(&slices).readv(&self.client.stream) {
                Ok(0) => break,
                // No more than the room, which is less than 4 GiB.
                Ok(len) => return u32::try_from(len).ok(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.client.readable = false;
                    return None;
                }
                Err(_) => {
                    self.client.gone = true;
                    break;
                }
            }
        }
        // The client's end of file. If it is gone altogether, it won't read either.
        self.client.readable = false;
        self.pending.shutdown |= if self.client.gone {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        };
        None
    }

    /// A packet of the guest's for this connection.
    pub fn guest_packet(&mut self, packet: &GuestPacket, mem: &GuestMemoryMmap) -> Fate {
        self.send.update(packet.credit);
        if self.send.free() > 0 {
            self.credit_requested = false;
        }
        match (packet.op, &self.state) {
            (Op::Reset, _) => {
                self.enter(State::Draining);
                return self.unless_drained();
            }
            (Op::Response, State::Requested) => self.accepted(),
            (Op::ReadWrite, State::Established) => self.guest_data(&packet.payload, mem),
            (Op::Shutdown, State::Established) => self.guest_shutdown(packet.flags),
            (Op::Shutdown, State::Lingering) => self.reset(),
            (Op::CreditRequest, State::Established) => self.pending.credit_update = true,
            (Op::CreditUpdate, State::Established) => {}
            // On their way when we shut down.
            (Op::ReadWrite | Op::CreditRequest | Op::CreditUpdate, State::Lingering) => {}
            _ => self.reset(),
        }
        Fate::Keep
    }

    fn accepted(&mut self) {
        self.enter(State::Established);
        let answer = answer(self.ports.host);
        // A fresh socket's buffer takes these few bytes; a client that lets it not is closed.
        match (&self.client.stream).write(answer.as_bytes()) {
            Ok(len) if len == answer.len() => {}
            _ => self.reset(),
        }
        // Bytes may have come before and their event is past.
        self.client.readable = true;
    }

    fn guest_data(&mut self, payload: &Segments, mem: &GuestMemoryMmap) {
        let len = payload.len() as u32;
        // §5.10.6.3: a sender must not send more than it has credit for; nor after its SHUTDOWN.
        if self.guest_shut & SHUTDOWN_SEND != 0 || !self.receive.receive(len) {
            self.reset();
            return;
        }
        let written = if self.client.gone || !self.client.buffer.is_empty() {
            0
        } else {
            self.write_client(payload, mem)
        };
        self.forwarded(written);
        if self.client.gone {
            self.forwarded(len);
            return;
        }
        let mut rest = payload.clone();
        rest.take_front(written as usize);
        let mut bytes = vec![0; rest.len()];
        rest.read(mem, &mut bytes);
        self.client.buffer.extend(bytes);
    }

    /// Writes guest memory to the socket without a copy of ours; gives how much it took.
    fn write_client(&mut self, payload: &Segments, mem: &GuestMemoryMmap) -> u32 {
        let mut vectors = IoVectors::new(&payload.slices(mem));
        let mut written = 0;
        while !vectors.is_empty() {
            match vectors.send(&self.client.stream) {
                Ok(len) => {
                    written += len as u32;
                    vectors.advance(len);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.stop_writing();
                    break;
                }
            }
        }
        written
    }

    /// Writes what is buffered, as much as the client takes.
    fn flush(&mut self) {
        while !self.client.buffer.is_empty() {
            let (front, _) = self.client.buffer.as_slices();
            match (&self.client.stream).write(front) {
                Ok(len) => {
                    self.client.buffer.drain(..len);
                    self.forwarded(len as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.stop_writing(),
            }
        }
        // Give a large buffer's memory back.
        self.client.buffer = VecDeque::new();
        self.after_flush();
    }

    fn forwarded(&mut self, len: u32) {
        self.receive.forward(len);
        self.pending.credit_update |= self.receive.update_due();
    }

    /// The client does not read any more: the guest must not go on sending.
    fn stop_writing(&mut self) {
        self.drop_buffer();
        self.client.gone = true;
        self.client.readable = true;
        self.pending.shutdown |= SHUTDOWN_RECEIVE;
    }

    fn drop_buffer(&mut self) {
        let len = self.client.buffer.len() as u32;
        self.client.buffer = VecDeque::new();
        self.forwarded(len);
        self.after_flush();
    }

    fn guest_shutdown(&mut self, flags: u32) {
        let new = flags & SHUTDOWN_BOTH & !self.guest_shut;
        self.guest_shut |= new;
        if new & SHUTDOWN_RECEIVE != 0 {
            // Makes the client's writes fail instead of blocking for ever.
            let _ = self.client.stream.shutdown(Shutdown::Read);
        }
        if self.client.buffer.is_empty() {
            self.after_flush();
        }
    }

    /// All bytes of the guest are with the client: a SHUTDOWN that came after them takes effect.
    fn after_flush(&mut self) {
        if self.guest_shut & SHUTDOWN_SEND != 0 {
            let _ = self.client.stream.shutdown(Shutdown::Write);
        }
        // §5.10.6.5: RST confirms that both directions are shut.
        if self.guest_shut == SHUTDOWN_BOTH {
            self.reset();
        }
    }
}

/// An RST for what belongs to no connection.
pub fn stray_reset(ports: Ports, kind: u16) -> HostPacket {
    HostPacket {
        kind,
        ..HostPacket::new(ports, Op::Reset, Credit::default())
    }
}
