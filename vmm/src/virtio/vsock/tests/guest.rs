//! A guest's driver, which sends and receives packets.

use super::super::super::testing::{Desc, DriverQueue, activation, event_loop, wait_until};
use super::super::super::{Interrupt, VirtioDevice};
use super::super::packet::{HEADER_LEN, Op, RawHeader};
use super::super::*;
use crate::event_loop::EventLoop;
use bulkhead_proto::guest::READY_PORT;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const RX_BASE: u64 = 0x1000;
pub const TX_BASE: u64 = 0x4000;
pub const EVENT_BASE: u64 = 0x7000;
pub const RX_BUFFERS: u64 = 0x10_0000;
pub const RX_BUFFER: u64 = 0x1000;
pub const TX_BUFFER: u64 = 0x20_0000;
pub const EVENT_BUFFER: u64 = 0x30_0000;
/// Like Linux's default.
pub const GUEST_BUFFER: u32 = 256 << 10;

/// A packet as the guest sees it: operation, ports, flags, credit, payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub op: u16,
    pub host: u32,
    pub guest: u32,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub payload: Vec<u8>,
}

pub struct Guest {
    pub mem: GuestMemoryMmap,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    pub event: DriverQueue,
    pub device: VsockDevice,
    pub interrupt: Arc<Interrupt>,
    pub knocks: Arc<AtomicUsize>,
    pub folder: tempfile::TempDir,
    pub fwd_cnt: u32,
    _events: EventLoop,
}

impl Guest {
    pub fn new() -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
        let events = event_loop();
        let knocks = Arc::new(AtomicUsize::new(0));
        let counter = knocks.clone();
        let on_ready = Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let mut device = VsockDevice::new(listener, on_ready, events.handle()).unwrap();
        let rx = DriverQueue::at(&mem, 64, RX_BASE);
        let tx = DriverQueue::at(&mem, 64, TX_BASE);
        let event = DriverQueue::at(&mem, 8, EVENT_BASE);
        let (activation, _line) = activation(&mem, &[&rx, &tx, &event], 0);
        let interrupt = activation.interrupt.clone();
        device.activate(activation).unwrap();
        Guest {
            mem,
            rx,
            tx,
            event,
            device,
            interrupt,
            knocks,
            folder,
            fwd_cnt: 0,
            _events: events,
        }
    }

    /// As after boot: buffers given, knocked.
    pub fn ready() -> Self {
        Self::ready_with(32)
    }

    pub fn ready_with(buffers: usize) -> Self {
        let mut guest = Guest::new();
        guest.give_buffers(buffers);
        guest.send(Op::Request, READY_PORT, 500, &[]);
        let answer = guest.recv();
        assert_eq!((answer.op, answer.host, answer.guest), (3, READY_PORT, 500));
        assert_eq!(guest.knocks.load(Ordering::SeqCst), 1);
        guest
    }

    pub fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let address = RX_BUFFERS + RX_BUFFER * u64::from(self.rx.next_head());
            self.rx.add(&[Desc::writable(address, RX_BUFFER as u32)]);
        }
        self.rx.kick();
    }

    pub fn try_recv(&mut self) -> Option<Seen> {
        let (head, len) = self.rx.used()?;
        let address = RX_BUFFERS + RX_BUFFER * u64::from(head);
        let mut bytes = vec![0; len as usize];
        self.mem
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8)), (2, 3), "context ids");
        assert_eq!(word(24) as usize, bytes.len() - HEADER_LEN);
        self.give_buffers(1);
        Some(Seen {
            op: word(28).to_le_bytes()[2].into(),
            host: word(16),
            guest: word(20),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            payload: bytes[HEADER_LEN..].to_vec(),
        })
    }

    pub fn recv(&mut self) -> Seen {
        wait_until("a packet", || self.try_recv())
    }

    /// Nothing comes for a while.
    pub fn expect_silence(&mut self) {
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(self.try_recv(), None);
    }

    pub fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
        self.mem
            .write_slice(header, GuestAddress(TX_BUFFER))
            .unwrap();
        self.mem
            .write_slice(payload, GuestAddress(TX_BUFFER + 0x1000))
            .unwrap();
        self.tx.add(&[
            Desc::readable(TX_BUFFER, header.len() as u32),
            Desc::readable(TX_BUFFER + 0x1000, payload.len() as u32),
        ]);
        self.tx.kick();
        self.tx.wait_used();
    }

    pub fn send_flags(&mut self, op: Op, host: u32, guest: u32, flags: u32, payload: &[u8]) {
        let mut header = Vec::new();
        header.extend(3u64.to_le_bytes());
        header.extend(2u64.to_le_bytes());
        header.extend(guest.to_le_bytes());
        header.extend(host.to_le_bytes());
        header.extend((payload.len() as u32).to_le_bytes());
        header.extend(1u16.to_le_bytes());
        header.extend((op as u16).to_le_bytes());
        header.extend(flags.to_le_bytes());
        header.extend(GUEST_BUFFER.to_le_bytes());
        header.extend(self.fwd_cnt.to_le_bytes());
        assert_eq!(header.len(), size_of::<RawHeader>());
        self.send_raw(&header, payload);
    }

    pub fn send(&mut self, op: Op, host: u32, guest: u32, payload: &[u8]) {
        self.send_flags(op, host, guest, 0, payload);
    }

    pub fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }

    /// An established connection; gives the client and the host's port.
    pub fn connect(&mut self, port: u32) -> (UnixStream, u32) {
        let mut client = self.client();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let request = self.recv();
        assert_eq!((request.op, request.guest), (1, port));
        self.send(Op::Response, request.host, port, &[]);
        assert_eq!(line(&mut client), format!("OK {}\n", request.host));
        (client, request.host)
    }
}

pub fn line(client: &mut UnixStream) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0].into());
    }
    line
}

impl Guest {
    pub fn try_recv_into(&mut self, received: &mut usize, asked: &mut usize) -> bool {
        let Some(packet) = self.try_recv() else {
            return false;
        };
        *received += packet.payload.len();
        *asked += usize::from(packet.op == Op::CreditRequest as u16);
        true
    }
}
