//! The device between a fake guest and real Unix sockets.

mod any_guest;
mod guest;

pub(super) use guest::*;

use super::super::VirtioDevice;
use super::super::testing::{Desc, DriverQueue, activation, wait_until};
use super::packet::{HEADER_LEN, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::*;
use bulkhead_proto::guest::READY_PORT;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

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
