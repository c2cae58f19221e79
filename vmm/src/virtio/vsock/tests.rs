//! The device between a fake guest and real Unix sockets.

use super::super::VirtioDevice;
use super::super::testing::{Desc, DriverQueue, activation, event_loop, wait_until};
use super::packet::{HEADER_LEN, Op, RawHeader, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::*;
use crate::event_loop::EventLoop;
use bulkhead_proto::guest::READY_PORT;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RX_BASE: u64 = 0x1000;
const TX_BASE: u64 = 0x4000;
const EVENT_BASE: u64 = 0x7000;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER: u64 = 0x1000;
const TX_BUFFER: u64 = 0x20_0000;
const EVENT_BUFFER: u64 = 0x30_0000;
/// Like Linux's default.
const GUEST_BUFFER: u32 = 256 << 10;

/// A packet as the guest sees it: operation, ports, flags, credit, payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) op: u16,
    pub(super) host: u32,
    pub(super) guest: u32,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
    pub(super) payload: Vec<u8>,
}

pub(super) struct Guest {
    pub(super) mem: GuestMemoryMmap,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    pub(super) device: VsockDevice,
    interrupt: Arc<super::super::Interrupt>,
    knocks: Arc<AtomicUsize>,
    pub(super) folder: tempfile::TempDir,
    fwd_cnt: u32,
    _events: EventLoop,
}

impl Guest {
    fn new() -> Self {
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
    pub(super) fn ready() -> Self {
        Self::ready_with(32)
    }

    fn ready_with(buffers: usize) -> Self {
        let mut guest = Guest::new();
        guest.give_buffers(buffers);
        guest.send(Op::Request, READY_PORT, 500, &[]);
        let answer = guest.recv();
        assert_eq!((answer.op, answer.host, answer.guest), (3, READY_PORT, 500));
        assert_eq!(guest.knocks.load(Ordering::SeqCst), 1);
        guest
    }

    fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let address = RX_BUFFERS + RX_BUFFER * u64::from(self.rx.next_head());
            self.rx.add(&[Desc::writable(address, RX_BUFFER as u32)]);
        }
        self.rx.kick();
    }

    fn try_recv(&mut self) -> Option<Seen> {
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

    pub(super) fn recv(&mut self) -> Seen {
        wait_until("a packet", || self.try_recv())
    }

    /// Nothing comes for a while.
    fn expect_silence(&mut self) {
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(self.try_recv(), None);
    }

    fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
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

    fn send_flags(&mut self, op: Op, host: u32, guest: u32, flags: u32, payload: &[u8]) {
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

    pub(super) fn send(&mut self, op: Op, host: u32, guest: u32, payload: &[u8]) {
        self.send_flags(op, host, guest, 0, payload);
    }

    pub(super) fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }

    /// An established connection; gives the client and the host's port.
    pub(super) fn connect(&mut self, port: u32) -> (UnixStream, u32) {
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

pub(super) fn line(client: &mut UnixStream) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0].into());
    }
    line
}

#[test]
fn clients_wait_for_the_knock_and_then_echo() {
    let mut guest = Guest::new();
    guest.give_buffers(8);
    let mut early = guest.client();
    early.write_all(b"CONNECT 1024\n").unwrap();
    guest.expect_silence();
    assert_eq!(guest.knocks.load(Ordering::SeqCst), 0);
    guest.send(Op::Request, READY_PORT, 500, &[]);
    assert_eq!(guest.recv().op, Op::Reset as u16);
    let request = guest.recv();
    assert_eq!((request.op, request.guest), (Op::Request as u16, 1024));
    assert!(request.buf_alloc >= 64 << 10);
    guest.send(Op::Response, request.host, 1024, &[]);
    assert_eq!(line(&mut early), format!("OK {}\n", request.host));

    early.write_all(b"hello").unwrap();
    let data = guest.recv();
    assert_eq!((data.op, data.payload.as_slice()), (5, &b"hello"[..]));
    guest.send(Op::ReadWrite, request.host, 1024, &data.payload);
    let mut echo = [0; 5];
    early.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"hello");

    // Another knock is refused, too, and tells nobody again.
    guest.send(Op::Request, READY_PORT, 501, &[]);
    assert_eq!(guest.recv().op, Op::Reset as u16);
    assert_eq!(guest.knocks.load(Ordering::SeqCst), 1);
}

#[test]
fn refusals_and_bad_lines_close_the_client() {
    let mut guest = Guest::ready();
    let mut refused = guest.client();
    refused.write_all(b"CONNECT 77\n").unwrap();
    let request = guest.recv();
    guest.send(Op::Reset, request.host, 77, &[]);
    assert_eq!(refused.read(&mut [0; 8]).unwrap(), 0);

    let mut bad = guest.client();
    bad.write_all(b"GET / HTTP/1.1\n").unwrap();
    assert_eq!(bad.read(&mut [0; 8]).unwrap_or(0), 0);
    guest.expect_silence();

    // A client that leaves before the answer: the guest is told.
    let mut gone = guest.client();
    gone.write_all(b"CONNECT 78\n").unwrap();
    assert_eq!(guest.recv().guest, 78);
    drop(gone);
    let reset = guest.recv();
    assert_eq!((reset.op, reset.guest), (Op::Reset as u16, 78));
}

#[test]
fn the_guest_can_open_no_conversation() {
    let mut guest = Guest::ready();
    for port in [1024, 1025, 22, 1 << 30, u32::MAX] {
        guest.send(Op::Request, port, 600, &[]);
        let answer = guest.recv();
        assert_eq!((answer.op, answer.host, answer.guest), (3, port, 600));
    }
    guest.send(Op::ReadWrite, 5, 6, b"data for nobody");
    assert_eq!(guest.recv().op, Op::Reset as u16);
    // An RST gets no answer.
    guest.send(Op::Reset, 5, 6, &[]);
    guest.expect_silence();
}

#[test]
fn a_mebibyte_each_way_arrives_whole_under_flow_control() {
    let mut guest = Guest::ready();
    let (client, host) = guest.connect(1025);
    let sent: Vec<u8> = (0..1u32 << 20).map(|at| (at / 3) as u8).collect();

    // To the guest, which tells its credit only when asked or every 128 KiB.
    let mut writer = client.try_clone().unwrap();
    let bytes = sent.clone();
    let thread = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    let mut received = Vec::new();
    let mut told = 0;
    while received.len() < sent.len() {
        let packet = guest.recv();
        match packet.op {
            5 => received.extend(packet.payload),
            7 => told = 0,
            op => panic!("unexpected operation {op}"),
        }
        assert!(received.len() as u32 - guest.fwd_cnt <= GUEST_BUFFER);
        if received.len() as u32 - guest.fwd_cnt > GUEST_BUFFER / 2 || told == 0 {
            guest.fwd_cnt = received.len() as u32;
            told = guest.fwd_cnt;
            guest.send(Op::CreditUpdate, host, 1025, &[]);
        }
    }
    thread.join().unwrap();
    assert!(received == sent);

    // From the guest, which sends only what it has credit for.
    let mut reader = client.try_clone().unwrap();
    let len = sent.len();
    let thread = std::thread::spawn(move || {
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).unwrap();
        bytes
    });
    let (mut at, mut credit) = (0u32, CLIENT_BUFFER);
    while (at as usize) < sent.len() {
        let len = credit.min(60_000).min(sent.len() as u32 - at);
        if len > 0 {
            let range = at as usize..(at + len) as usize;
            guest.send(Op::ReadWrite, host, 1025, &sent[range]);
            (at, credit) = (at + len, credit - len);
        }
        while credit == 0 && (at as usize) < sent.len() {
            let packet = guest.recv();
            assert_eq!(packet.op, Op::CreditUpdate as u16);
            credit = packet.buf_alloc - (at - packet.fwd_cnt);
        }
    }
    assert!(thread.join().unwrap() == sent);
}

#[test]
fn without_credit_the_client_stalls_and_goes_on_with_it() {
    let mut guest = Guest::ready();
    let (mut client, host) = guest.connect(1024);
    client.set_nonblocking(true).unwrap();
    let chunk = [7; 4096];
    let mut written = 0;
    let mut received = 0;
    let mut asked = 0;
    // The guest never tells of any credit beyond its first buffer.
    wait_until("the stall", || {
        while let Ok(len) = client.write(&chunk) {
            written += len;
        }
        while guest.try_recv_into(&mut received, &mut asked) {}
        (received == GUEST_BUFFER as usize && asked > 0).then_some(())
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!guest.try_recv_into(&mut received, &mut asked));
    assert_eq!(asked, 1, "one CREDIT_REQUEST");
    assert!(written > received);
    guest.fwd_cnt = GUEST_BUFFER;
    guest.send(Op::CreditUpdate, host, 1024, &[]);
    wait_until("the rest", || {
        while guest.try_recv_into(&mut received, &mut asked) {}
        (received == written).then_some(())
    });
}

impl Guest {
    fn try_recv_into(&mut self, received: &mut usize, asked: &mut usize) -> bool {
        let Some(packet) = self.try_recv() else {
            return false;
        };
        *received += packet.payload.len();
        *asked += usize::from(packet.op == Op::CreditRequest as u16);
        true
    }
}

#[test]
fn a_client_that_does_not_read_bounds_the_guest_and_loses_nothing() {
    let mut guest = Guest::ready();
    let (mut client, host) = guest.connect(1024);
    let chunk = vec![3; 16 << 10];
    let mut sent = 0;
    // The socket's own buffer takes some, then ours fills up until no update comes any more.
    let mut credit = CLIENT_BUFFER;
    loop {
        while credit >= chunk.len() as u32 {
            guest.send(Op::ReadWrite, host, 1024, &chunk);
            sent += chunk.len();
            credit -= chunk.len() as u32;
        }
        std::thread::sleep(Duration::from_millis(20));
        let Some(update) = guest.try_recv() else {
            break;
        };
        assert_eq!(update.op, Op::CreditUpdate as u16);
        credit = update.buf_alloc - (sent as u32 - update.fwd_cnt);
    }
    // All of it is still there for the client, even after the guest has left for good.
    guest.send_flags(Op::Shutdown, host, 1024, SHUTDOWN_BOTH, &[]);
    std::thread::sleep(Duration::from_millis(50));
    while let Some(late) = guest.try_recv() {
        assert_eq!(late.op, Op::CreditUpdate as u16);
    }
    guest.send(Op::Reset, host, 1024, &[]);
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), sent);

    // One byte more than the credit breaks a connection.
    let (mut client, host) = guest.connect(1024);
    for _ in 0..64 {
        guest.send(Op::ReadWrite, host, 1024, &[1; 60_000]);
    }
    let reset = wait_until("an RST", || {
        guest
            .try_recv()
            .filter(|packet| packet.op == Op::Reset as u16)
    });
    assert_eq!(reset.host, host);
    let _ = client.read_to_end(&mut Vec::new());
}

#[test]
fn each_direction_is_shut_by_itself() {
    let mut guest = Guest::ready();
    // The client ends first, the guest goes on sending.
    let (mut client, host) = guest.connect(1024);
    client.write_all(b"last words").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.recv().payload, b"last words");
    let shutdown = guest.recv();
    assert_eq!((shutdown.op, shutdown.flags), (4, SHUTDOWN_SEND));
    guest.send(Op::ReadWrite, host, 1024, b"answer");
    guest.send_flags(Op::Shutdown, host, 1024, SHUTDOWN_BOTH, &[]);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert_eq!(guest.recv().op, Op::Reset as u16);

    // The guest ends first, the client goes on sending.
    let (mut client, host) = guest.connect(1024);
    guest.send(Op::ReadWrite, host, 1024, b"bye");
    guest.send_flags(Op::Shutdown, host, 1024, SHUTDOWN_SEND, &[]);
    let mut bye = String::new();
    client.read_to_string(&mut bye).unwrap();
    assert_eq!(bye, "bye");
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.recv().payload, b"still here");
    // Data after its SHUTDOWN is a breach.
    guest.send(Op::ReadWrite, host, 1024, b"?");
    assert_eq!(guest.recv().op, Op::Reset as u16);

    // The client closes altogether: both directions, and what it wrote before arrives.
    let (mut client, host) = guest.connect(1024);
    client.write_all(b"gone").unwrap();
    drop(client);
    assert_eq!(guest.recv().payload, b"gone");
    let mut flags = 0;
    while flags != SHUTDOWN_BOTH {
        let shutdown = guest.recv();
        assert_eq!(shutdown.op, Op::Shutdown as u16);
        flags = shutdown.flags;
    }
    guest.send(Op::Reset, host, 1024, &[]);
    guest.expect_silence();
}

#[test]
fn turns_go_round() {
    // So few buffers that all clients soon wait for their turns.
    let mut guest = Guest::ready_with(4);
    let mut clients: Vec<_> = (0..4).map(|_| guest.connect(1024)).collect();
    for (client, _) in &mut clients {
        client.write_all(&[0; 100_000]).unwrap();
    }
    let order: Vec<u32> = (0..60).map(|_| guest.recv().host).collect();
    for (_, host) in &clients {
        let turns = order[20..].iter().filter(|&port| port == host).count();
        assert!((9..=11).contains(&turns), "{host}: {turns} of 40");
    }
}

#[test]
fn a_transport_reset_ends_connections_and_a_device_reset_starts_anew() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.connect(1024);
    guest.device.reset_transport().unwrap();
    guest.expect_silence();
    guest
        .mem
        .write_obj(0xffff_ffffu32, GuestAddress(EVENT_BUFFER))
        .unwrap();
    guest.event.add(&[Desc::writable(EVENT_BUFFER, 4)]);
    guest.event.kick();
    assert_eq!(guest.event.wait_used().1, 4);
    let event: u32 = guest.mem.read_obj(GuestAddress(EVENT_BUFFER)).unwrap();
    assert_eq!(event, 0);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);

    let (mut client, _) = guest.connect(1024);
    assert_eq!(guest.device.reset().unwrap().len(), 3);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    guest.rx = DriverQueue::at(&guest.mem, 64, RX_BASE);
    guest.tx = DriverQueue::at(&guest.mem, 64, TX_BASE);
    guest.event = DriverQueue::at(&guest.mem, 8, EVENT_BASE);
    let (activation, _line) = activation(&guest.mem, &[&guest.rx, &guest.tx, &guest.event], 0);
    guest.interrupt = activation.interrupt.clone();
    guest.device.activate(activation).unwrap();
    guest.give_buffers(32);
    guest.send(Op::Request, READY_PORT, 500, &[]);
    assert_eq!(guest.recv().op, Op::Reset as u16);
    assert_eq!(guest.knocks.load(Ordering::SeqCst), 1);
    let (mut client, _) = guest.connect(1024);
    client.write_all(b"again").unwrap();
    assert_eq!(guest.recv().payload, b"again");
}

#[test]
fn buffers_too_small_for_a_packet_need_a_reset() {
    let mut guest = Guest::new();
    guest
        .rx
        .add(&[Desc::writable(RX_BUFFERS, HEADER_LEN as u32)]);
    guest.rx.kick();
    guest.send(Op::Request, READY_PORT, 500, &[]);
    wait_until("DEVICE_NEEDS_RESET", || {
        guest.interrupt.reset_needed().then_some(())
    });
}

#[test]
fn hundreds_of_clients_come_and_go() {
    let mut guest = Guest::ready();
    for _ in 0..8 {
        let mut open: Vec<_> = (0..32).map(|_| guest.connect(1024)).collect();
        for (client, _) in &mut open {
            client.write_all(b"x").unwrap();
        }
        drop(open);
        let mut resets = 0;
        while resets < 32 {
            let packet = guest.recv();
            if packet.op == Op::Shutdown as u16 && packet.flags == SHUTDOWN_BOTH {
                guest.send(Op::Reset, packet.host, packet.guest, &[]);
                resets += 1;
            }
        }
    }
    guest.expect_silence();
}

mod any_guest {
    use super::super::muxer::{FIRST_HOST_PORT, Muxer};
    use super::super::packet::{Credit, GuestPacket, Ports};
    use super::*;
    use event_manager::EventSet;
    use proptest::prelude::*;

    fn op() -> impl Strategy<Value = Op> {
        prop::sample::select(vec![
            Op::Request,
            Op::Response,
            Op::Response,
            Op::Reset,
            Op::Shutdown,
            Op::ReadWrite,
            Op::ReadWrite,
            Op::CreditUpdate,
            Op::CreditRequest,
        ])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any packets on connections in any state: no panic, no packet for a connection that is
        /// over, and never a payload beyond the credit that the guest gave.
        #[test]
        fn cannot_confuse_the_muxer(
            packets in prop::collection::vec((op(), 0u32..4, 0u32..4, 0u32..0x8000, 0u32..300_000, 0u32..300_000), 1..80),
        ) {
            let mem = super::super::super::testing::memory();
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join("s")).unwrap();
            listener.set_nonblocking(true).unwrap();
            let mut muxer = Muxer::new(listener, FIRST_HOST_PORT, false);
            let mut clients: Vec<_> = (0..3)
                .map(|_| {
                    let mut client = UnixStream::connect(folder.path().join("s")).unwrap();
                    client.write_all(b"CONNECT 1024\nsome bytes").unwrap();
                    client
                })
                .collect();
            muxer.accept(8);
            let room = |mem: &GuestMemoryMmap| {
                let mut queue = DriverQueue::new(mem, 8);
                queue.add(&[Desc::writable(0x8000, 0x4000)]);
                let chain = queue.device_side(mem).pop(mem).unwrap().unwrap();
                crate::virtio::buffers::Buffers::collect(chain, mem, 4).unwrap()
            };
            let knock = GuestPacket {
                ports: Ports { host: READY_PORT, guest: 1 },
                op: Op::Request,
                flags: 0,
                credit: Credit::default(),
                payload: Default::default(),
            };
            prop_assert!(muxer.guest_packet(Ok(knock), &mem));
            for (op, connection, flags, len, buf_alloc, fwd_cnt) in packets {
                let host = FIRST_HOST_PORT + connection;
                muxer.client_event(host, EventSet::IN | EventSet::OUT);
                let mut payload = room(&mem).writable;
                let len = if op == Op::ReadWrite { len as usize } else { 0 };
                let packet = GuestPacket {
                    ports: Ports { host, guest: 1024 },
                    op,
                    flags,
                    credit: Credit { buf_alloc, fwd_cnt },
                    payload: payload.take_front(len),
                };
                prop_assert!(!muxer.guest_packet(Ok(packet), &mem));
                if flags == 3 {
                    clients.pop();
                    muxer.client_event(host, EventSet::HANG_UP);
                }
                let buffers = room(&mem);
                for _ in 0..8 {
                    let Some(sent) = muxer.next_packet(&buffers.writable, &mem) else { break };
                    prop_assert!(sent.len <= buf_alloc.max(300_000));
                    prop_assert!((sent.len == 0) == (sent.op != Op::ReadWrite));
                }
                muxer.take_watches();
            }
        }
    }
}
