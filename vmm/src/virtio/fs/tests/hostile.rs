//! Messages and chains that no driver of good will sends.

use super::super::super::VirtioDevice;
use super::super::super::testing::{Desc, wait_until};
use super::client::*;
use proptest::prelude::*;
use std::fs;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn names_that_are_no_component_are_refused() {
    let mut client = Client::new();
    fs::create_dir(client.share.join("folder")).unwrap();
    fs::write(client.share.join("file"), "").unwrap();
    let folder = client.lookup(ROOT, "folder");
    let file = client.lookup(ROOT, "file");
    let absolute = client.folder.path().join("made");
    let absolute = absolute.to_str().unwrap();
    for name in [
        "..",
        ".",
        "",
        "/",
        "../made",
        "a/b",
        "folder/../../made",
        absolute,
    ] {
        for parent in [ROOT, folder] {
            for (opcode, request) in [
                (LOOKUP, body().name(name)),
                (MKDIR, body().u32(0o755).u32(0).name(name)),
                (MKNOD, body().u32(0o100_644).u32(0).u32(0).u32(0).name(name)),
                (SYMLINK, body().name(name).name("target")),
                (CREATE, body().u32(2).u32(0o644).u32(0).u32(0).name(name)),
                (LINK, body().u64(file).name(name)),
                (UNLINK, body().name(name)),
                (RMDIR, body().name(name)),
                (RENAME, body().u64(ROOT).name("file").name(name)),
                (RENAME, body().u64(ROOT).name(name).name("new")),
            ] {
                let result = client.send(opcode, parent, request);
                assert_eq!(result, Err(libc::EINVAL), "operation {opcode} on {name:?}");
            }
        }
    }
    let mut names: Vec<_> = fs::read_dir(client.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["secret", "share"]);
    let long = "x".repeat(256);
    assert_eq!(
        client.send(LOOKUP, ROOT, body().name(&long)),
        Err(libc::ENAMETOOLONG)
    );
}

#[test]
fn messages_without_sense_are_answered_or_dropped() {
    let mut client = Client::new();
    // 48 and 49 are the DAX window's.
    for (opcode, error) in [
        (0, libc::ENOSYS),
        (7, libc::ENOSYS),
        (IOCTL, libc::ENOTTY),
        (48, libc::EINVAL),
        (49, libc::EINVAL),
        (99, libc::ENOSYS),
        (u32::MAX, libc::ENOSYS),
    ] {
        let answer = client.send(opcode, ROOT, body().bytes(&[0; 64]));
        assert_eq!(answer, Err(error), "{opcode}");
    }
    // Too short for a header: no answer can be given.
    for len in [0, 1, 39] {
        assert!(client.raw(&vec![1; len], 4096).is_empty());
    }
    // Too short for its fields, a name without its NUL, a length beyond the bytes that are there.
    let mut long = client.message(LOOKUP, ROOT, b"x\0");
    long[..4].copy_from_slice(&0x1000u32.to_le_bytes());
    for message in [
        client.message(MKDIR, ROOT, &[0; 3]),
        client.message(LOOKUP, ROOT, b"name"),
        long,
    ] {
        let reply = client.raw(&message, 4096);
        assert_eq!(reply.len(), 16);
        assert_eq!(u32_at(&reply, 4) as i32, -libc::EINVAL);
        assert_eq!(u64_at(&reply, 8), 77);
    }
    // No room for an answer.
    let message = client.message(GETATTR, ROOT, &[0; 16]);
    assert!(client.raw(&message, 8).is_empty());
    // Nodes and handles that don't exist.
    for node in [2, 99, u64::MAX] {
        assert_eq!(
            client.send(LOOKUP, node, body().name("x")),
            Err(libc::EBADF)
        );
        assert_eq!(client.read(READ, node, 5, 100), Err(libc::EBADF));
    }
    // A folder's listing longer than any reply.
    let handle = client.open(OPENDIR, ROOT, libc::O_RDONLY).unwrap();
    assert_eq!(
        client.read(READDIR, ROOT, handle, u32::MAX),
        Err(libc::ENOMEM)
    );
    // FORGET has no answer and comes on its own queue.
    client.forget(ROOT, u64::MAX);
    client.ok(GETATTR, ROOT, body().u32(0).u32(0).u64(0));
    assert!(!client.interrupt.reset_needed());
}

#[test]
fn endless_messages_are_refused_and_broken_chains_need_a_reset() {
    let mut client = Client::new();
    let message = client.message(GETATTR, ROOT, &[0; 16]);
    client
        .mem
        .write_slice(&message, GuestAddress(REQUEST))
        .unwrap();
    let mut chain = vec![Desc::readable(REQUEST, message.len() as u32)];
    chain.extend(vec![Desc::writable(REPLY, 0x10_0000); 8]);
    client.requests.add(&chain);
    client.requests.kick();
    assert_eq!(client.requests.wait_used().1, 0);

    let looped = [
        Desc::readable(REQUEST, 56),
        Desc::writable(REPLY, 16).next(0),
    ];
    client.requests.add_head(0);
    let mut broken = Client::new();
    broken.requests.add(&looped);
    broken.requests.kick();
    wait_until("DEVICE_NEEDS_RESET", || {
        broken.interrupt.reset_needed().then_some(())
    });
}

fn any_message() -> impl Strategy<Value = (u32, u64, Vec<u8>, u32)> {
    let opcode = prop_oneof![8 => 1u32..52, 1 => any::<u32>()];
    let node = prop_oneof![8 => 1u64..5, 1 => any::<u64>()];
    let word = prop_oneof![
        4 => (0u64..4).prop_map(|value| value.to_le_bytes().to_vec()),
        1 => any::<u64>().prop_map(|value| value.to_le_bytes().to_vec()),
        3 => prop::sample::select(vec!["a", "b", "..", "/", "../secret", "a/b"])
            .prop_map(|name| format!("{name}\0").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    let bytes = prop::collection::vec(word, 0..8).prop_map(|words| words.concat());
    let room = prop_oneof![4 => Just(0x4000u32), 1 => 0u32..200];
    (opcode, node, bytes, room)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any messages: the server lives, the ring lives, and nothing beside the share is touched.
    #[test]
    fn any_messages_stay_inside(messages in prop::collection::vec(any_message(), 1..32)) {
        let mut client = Client::new();
        fs::write(client.share.join("a"), "a").unwrap();
        fs::create_dir(client.share.join("b")).unwrap();
        client.lookup(ROOT, "a");
        client.lookup(ROOT, "b");
        for (opcode, node, bytes, room) in messages {
            // fallocate(2) could fill the host's disk, which is the guest's right.
            if opcode == FALLOCATE {
                continue;
            }
            let message = client.message(opcode, node, &bytes);
            let reply = client.raw(&message, room);
            prop_assert!(reply.len() <= room as usize);
        }
        client.ok(GETATTR, ROOT, body().u32(0).u32(0).u64(0));
        prop_assert!(!client.interrupt.reset_needed());
        prop_assert_eq!(fs::read(client.folder.path().join("secret")).unwrap(), b"secret");
        prop_assert_eq!(fs::read_dir(client.folder.path()).unwrap().count(), 2);
    }

    /// Any chains, looped and indirect ones among them: the worker lives.
    #[test]
    fn any_chains_are_survived(chains in prop::collection::vec(prop::collection::vec(Desc::any(), 1..6), 1..8)) {
        let mut client = Client::new();
        for chain in &chains {
            client.requests.add(chain);
            client.requests.kick();
        }
        wait_until("an end", || {
            let mut all = 0;
            while client.requests.used().is_some() {
                all += 1;
            }
            (all > 0 || client.interrupt.reset_needed()).then_some(())
        });
        prop_assert_eq!(client.device.reset().unwrap().len(), 2);
    }
}
