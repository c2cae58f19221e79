//! A machine is saved without connections, and its guest is dialled at once after.

use super::super::VirtioDevice;
use super::super::testing::{activation, event_loop};
use super::packet::Op;
use super::tests::{Guest, line};
use super::*;
use std::io::Write;
use std::os::unix::net::UnixListener;

#[test]
fn an_open_connection_is_not_cut_by_suspending() {
    let mut guest = Guest::ready();
    let (mut client, host) = guest.connect(1024);
    let error = guest.device.suspend().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the vsock device is in use: 1 connection is open"
    );
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.recv().payload, b"still here");
    guest.send(Op::Reset, host, 1024, &[]);
    drop(client);
    let (queues, state) =
        super::super::testing::wait_until("the connection's end", || guest.device.suspend().ok());
    assert_eq!(queues.len(), 3);

    // In another process, without a knock.
    let events = event_loop();
    let listener = UnixListener::bind(guest.folder.path().join("other")).unwrap();
    let mut device = VsockDevice::new(listener, Box::new(|| ()), events.handle()).unwrap();
    let (mut activation, _line) = activation(&guest.mem, &[], 0);
    activation.queues = queues;
    device.resume(activation, state).unwrap();
    guest.device = device;
    std::fs::remove_file(guest.folder.path().join("vsock")).unwrap();
    std::fs::rename(
        guest.folder.path().join("other"),
        guest.folder.path().join("vsock"),
    )
    .unwrap();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1025\n").unwrap();
    let request = guest.recv();
    assert_eq!((request.op, request.guest), (1, 1025));
    assert_ne!(request.host, host, "ports begin at random");
    guest.send(Op::Response, request.host, 1025, &[]);
    assert_eq!(line(&mut client), format!("OK {}\n", request.host));
}

#[test]
fn ports_begin_at_random() {
    let first = |mut guest: Guest| guest.connect(1024).1;
    let ports: std::collections::BTreeSet<u32> = (0..4).map(|_| first(Guest::ready())).collect();
    // Four equal ones of 2^31 would be a broken generator.
    assert!(ports.len() > 1, "{ports:?}");
    assert!(ports.iter().all(|port| *port >= 1 << 30));
}
