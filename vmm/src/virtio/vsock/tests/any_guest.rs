//! Packets that no driver of good will sends.

use super::super::super::testing::{Desc, DriverQueue};
use super::super::muxer::{FIRST_HOST_PORT, Muxer};
use super::super::packet::Op;
use super::super::packet::{Credit, GuestPacket, Ports};
use bulkhead_proto::guest::READY_PORT;
use event_manager::EventSet;
use proptest::prelude::*;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use vm_memory::GuestMemoryMmap;

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
