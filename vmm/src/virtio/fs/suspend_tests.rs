//! A client whose server is replaced behind its back.

use super::super::testing::{Desc, activation, install_filter};
use super::super::{DeviceState, VirtioDevice};
use super::tests::{Client, ROOT, body};
use super::*;
use crate::event_loop::EventLoop;
use crate::seccomp::ThreadKind;
use std::fs::File;
use std::os::fd::OwnedFd;
use vm_memory::{Bytes, GuestAddress};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const RELEASEDIR: u32 = 29;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const FORGET_BUFFER: u64 = 0x30_0000;

/// FORGET has no answer; the request after it, on the other queue, may be served before.
fn forget(client: &mut Client, node: u64, count: u64) {
    let message = client.message(FORGET, node, &count.to_le_bytes());
    client
        .mem
        .write_slice(&message, GuestAddress(FORGET_BUFFER))
        .unwrap();
    client
        .priority
        .add(&[Desc::readable(FORGET_BUFFER, message.len() as u32)]);
    client.priority.kick();
    client.priority.wait_used();
}

#[track_caller]
fn refused(client: &mut Client) -> String {
    let error = client.device.suspend().unwrap_err().to_string();
    // It works on.
    client.ok(GETATTR, ROOT, body().bytes(&[0; 16]));
    error
}

#[test]
fn a_client_that_knows_files_is_not_suspended() {
    let mut client = Client::new();
    std::fs::write(client.share.join("file"), "x").unwrap();
    let node = client.lookup(ROOT, "file");
    assert_eq!(
        refused(&mut client),
        "the fs device is in use: the guest knows 1 files and has 0 open"
    );
    client.lookup(ROOT, "file");
    forget(&mut client, node, 1);
    assert!(refused(&mut client).contains("knows 1 files"));
    forget(&mut client, node, 1);
    // The root is nobody's to forget.
    forget(&mut client, ROOT, 5);

    let opened = client.ok(OPENDIR, ROOT, body().u32(0).u32(0));
    assert!(refused(&mut client).contains("has 1 open"));
    client.ok(RELEASEDIR, ROOT, body().bytes(&opened[..8]).bytes(&[0; 16]));
    assert_eq!(
        client.send(LOOKUP, ROOT, body().name("none")),
        Err(libc::ENOENT)
    );
    client.device.suspend().unwrap();
}

#[test]
fn another_server_goes_on_as_negotiated() {
    let mut client = Client::new();
    let (queues, state) = client.device.suspend().unwrap();
    assert!(matches!(state, DeviceState::Fs { capable: Some(_) }));

    // Another folder in another process.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("other"), "there").unwrap();
    let events = EventLoop::new("fs", || install_filter(ThreadKind::FileServer)).unwrap();
    let share = OwnedFd::from(File::open(folder.path()).unwrap());
    let mut device = FsDevice::new(share, events.handle()).unwrap();
    let (mut activation, _line) = activation(&client.mem, &[], 0);
    activation.queues = queues;
    device.resume(activation, state).unwrap();
    client.device = device;

    assert_eq!(
        client.send(LOOKUP, ROOT, body().name("file")),
        Err(libc::ENOENT)
    );
    client.lookup(ROOT, "other");
    // Without the options that were negotiated, creating would not drop privileges' bits.
    let args = body().u32(0o1).u32(0o644).u32(0o22).u32(0).name("new");
    client.ok(CREATE, ROOT, args);
    assert!(folder.path().join("new").exists());
    assert!(refused(&mut client).contains("knows 2 files and has 1 open"));
}

#[test]
fn a_share_that_was_never_mounted_has_nothing_to_negotiate() {
    let mut client = Client::new();
    client.device.reset().unwrap();
    let (queues, state) = client.device.suspend().unwrap();
    assert!(queues.is_empty());
    assert_eq!(state, DeviceState::None);
}
