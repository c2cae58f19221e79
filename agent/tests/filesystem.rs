//! What containers see of the file system, and that nothing leads out of it.

mod common;

use common::{Agent, host_is_able, status, with};
use serde_json::json;
use std::os::unix::fs::{PermissionsExt, symlink};
use ttrpc::Code;

async fn output(agent: &Agent, id: &str, spec: serde_json::Value, script: &str) -> String {
    let spec = with(spec, "/process/args", json!(["sh", "-c", script]));
    let (status, out, err) = agent.run(id, &spec).await;
    assert_eq!((status, &*err), (0, ""), "{script}: {out}");
    out
}

#[tokio::test]
async fn the_default_devices_and_links_are_there() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let script = "cd /dev; stat -c '%n %t:%T %a' null zero full random urandom tty; \
        for l in fd stdin stdout stderr ptmx; do readlink $l; done; echo x > /dev/null; head -c 3 /dev/zero | wc -c; \
        echo again > /dev/stdout; ls -1d /dev/pts/ptmx";
    let spec = agent.spec("c1", &["true"]);
    let expected = "null 1:3 666\nzero 1:5 666\nfull 1:7 666\nrandom 1:8 666\nurandom 1:9 666\ntty 5:0 666\n\
        /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n3\nagain\n/dev/pts/ptmx\n";
    assert_eq!(output(&agent, "c1", spec, script).await, expected);
    agent.assert_nothing_left();
}

#[tokio::test]
async fn devices_of_the_spec_are_made() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let devices = json!([
        {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o600, "uid": 7, "gid": 8},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
        {"path": "/dev/pipe", "type": "p", "major": 0, "minor": 0},
    ]);
    let spec = with(agent.spec("c1", &["true"]), "/linux/devices", devices);
    let script = "stat -c '%t:%T %a %u:%g %F' /dev/net/tun /dev/null; stat -c %F /dev/pipe";
    assert_eq!(
        output(&agent, "c1", spec, script).await,
        "a:c8 600 7:8 character special file\n1:3 666 0:0 character special file\nfifo\n"
    );
}

#[tokio::test]
async fn masked_and_readonly_paths_are() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["true"]);
    std::fs::create_dir_all(agent.path().join("c1/secret/folder")).expect("a folder");
    std::fs::write(agent.path().join("c1/secret/file"), "hidden").expect("a file");
    let spec = with(
        spec,
        "/linux/maskedPaths",
        json!(["/secret/folder", "/secret/file", "/proc/version", "/none"]),
    );
    let spec = with(
        spec,
        "/linux/readonlyPaths",
        json!(["/proc/sys", "/tmp", "/none/either"]),
    );
    let script = "cat /secret/file | wc -c; ls /secret/folder | wc -l; stat -c %t:%T /proc/version; \
        touch /tmp/x 2>/dev/null || echo tmp; touch /secret/folder/x 2>/dev/null || echo folder; \
        echo 1 2>/dev/null >/proc/sys/vm/swappiness || echo sys; touch /root/x && echo rest";
    assert_eq!(
        output(&agent, "c1", spec, script).await,
        "0\n0\n1:3\ntmp\nfolder\nsys\nrest\n"
    );
}

#[tokio::test]
async fn a_readonly_rootfs_cannot_be_written_but_its_mounts_can() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = with(agent.spec("c1", &["true"]), "/root/readonly", json!(true));
    let script = "touch /x 2>/dev/null || echo refused; touch /dev/shm/x && echo allowed; pwd";
    let spec = with(spec, "/process/cwd", json!("/made/for/it"));
    assert_eq!(
        output(&agent, "c1", spec, script).await,
        "refused\nallowed\n/made/for/it\n"
    );
    assert!(!agent.path().join("c1/x").exists());
}

#[tokio::test]
async fn bind_mounts_have_their_options() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let mut spec = agent.spec("c1", &["true"]);
    let volume = agent.path().join("volume");
    std::fs::create_dir(&volume).expect("a folder");
    std::fs::write(volume.join("file"), "content\n").expect("a file");
    for (destination, source, options) in [
        (
            "/writable/deep",
            volume.clone(),
            json!(["rbind", "rprivate", "rw"]),
        ),
        (
            "/readonly",
            volume.clone(),
            json!(["rbind", "rprivate", "ro", "noexec", "nosuid"]),
        ),
        ("/recursive", volume.clone(), json!(["rbind", "rro"])),
        (
            "/etc/one-file",
            volume.join("file"),
            json!(["bind", "ro", "noatime"]),
        ),
    ] {
        let mount = json!({"destination": destination, "type": "bind", "source": source, "options": options});
        spec = with(spec, "/mounts/-", mount);
    }
    let script = "cat /etc/one-file; touch /writable/deep/made && echo written; \
        for f in /readonly /recursive; do touch $f/x 2>/dev/null || echo refused; done; \
        grep -c ' /readonly ro,nosuid,noexec' /proc/self/mountinfo; grep -c ' /etc/one-file ro,noatime' /proc/self/mountinfo";
    assert_eq!(
        output(&agent, "c1", spec.clone(), script).await,
        "content\nwritten\nrefused\nrefused\n1\n1\n"
    );
    assert!(volume.join("made").exists());

    let missing = json!({"destination": "/m", "type": "bind", "source": "/no/such/volume", "options": ["bind"]});
    let (code, message) = status(
        agent
            .create(
                "c2",
                &with(spec.clone(), "/mounts/-", missing),
                Default::default(),
            )
            .await,
    );
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.contains("/no/such/volume"), "{message}");
    let unlike = json!({"destination": "/etc/passwd", "type": "bind", "source": volume, "options": ["bind"]});
    assert_eq!(
        status(
            agent
                .create(
                    "c2",
                    &with(spec.clone(), "/mounts/-", unlike),
                    Default::default()
                )
                .await
        )
        .0,
        Code::INVALID_ARGUMENT
    );
    let unknown = json!({"destination": "/m", "type": "nosuchfs"});
    let (code, message) = status(
        agent
            .create("c2", &with(spec, "/mounts/-", unknown), Default::default())
            .await,
    );
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("nosuchfs"), "{message}");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_tmpfs_can_start_with_what_it_covers() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["true"]);
    std::fs::create_dir_all(agent.path().join("c1/var/lib")).expect("a folder");
    std::fs::write(agent.path().join("c1/var/lib/file"), "copied\n").expect("a file");
    let mount = json!({"destination": "/var", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m", "nosuid"]});
    let spec = with(spec, "/mounts/-", mount);
    let script = "cat /var/lib/file; echo new > /var/lib/file; cat /var/lib/file; grep -c ' /var rw,nosuid' /proc/self/mountinfo";
    assert_eq!(output(&agent, "c1", spec, script).await, "copied\nnew\n1\n");
    let below = std::fs::read_to_string(agent.path().join("c1/var/lib/file")).expect("a file");
    assert_eq!(below, "copied\n");
}

#[tokio::test]
async fn what_is_mounted_can_be_mounted_again_with_other_options() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let mut spec = agent.spec("c1", &["true"]);
    let volume = agent.path().join("volume");
    std::fs::create_dir(&volume).expect("a folder");
    for mount in [
        json!({"destination": "/v", "type": "bind", "source": volume, "options": ["bind"]}),
        json!({"destination": "/v", "source": "none", "options": ["remount", "bind", "ro"]}),
        json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}),
        json!({"destination": "/t", "options": ["remount", "nosuid", "size=2m"]}),
    ] {
        spec = with(spec, "/mounts/-", mount);
    }
    let script = "touch /v/x 2>/dev/null || echo refused; grep -c ' /t rw,nosuid.*size=2048k' /proc/self/mountinfo";
    assert_eq!(
        output(&agent, "c1", spec.clone(), script).await,
        "refused\n1\n"
    );
    let nothing = json!({"destination": "/root", "options": ["remount", "bind", "ro"]});
    let spec = with(spec, "/mounts/-", nothing);
    let (code, message) = status(agent.create("c2", &spec, Default::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("nothing is mounted on /root"), "{message}");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn links_in_the_image_lead_nowhere_outside() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let outside = agent.path().join("outside");
    std::fs::create_dir(&outside).expect("a folder");
    let volume = agent.path().join("volume");
    std::fs::create_dir(&volume).expect("a folder");
    std::fs::write(volume.join("file"), "volume\n").expect("a file");
    let spec = agent.spec("c1", &["true"]);
    symlink(&outside, agent.path().join("c1/absolute")).expect("a link");
    symlink("../../../../../..", agent.path().join("c1/relative")).expect("a link");
    let inside = agent
        .path()
        .join("c1")
        .join(outside.strip_prefix("/").expect("absolute"));
    std::fs::create_dir_all(&inside).expect("a folder");
    let mut spec = spec;
    for destination in ["/absolute", "/relative/mnt", "/../../up"] {
        let mount = json!({"destination": destination, "type": "bind", "source": volume, "options": ["bind"]});
        spec = with(spec, "/mounts/-", mount);
    }
    let script = format!("cat {}/file /mnt/file /up/file", outside.display());
    assert_eq!(
        output(&agent, "c1", spec.clone(), &script).await,
        "volume\nvolume\nvolume\n"
    );
    assert_eq!(std::fs::read_dir(&outside).expect("a folder").count(), 0);
    assert!(!std::path::Path::new("/up").exists());

    // /proc must be what later steps take it for.
    std::fs::remove_dir(agent.path().join("c1/proc")).expect("removed");
    symlink("tmp", agent.path().join("c1/proc")).expect("a link");
    let (code, message) = status(agent.create("c2", &spec, Default::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("/proc"), "{message}");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn nothing_of_the_agent_is_inherited() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    // While another container waits to be started, with streams open.
    let waiting = agent.spec("c0", &["cat"]);
    let (tokens, [stdin, stdout, _stderr]) = agent.streams().await;
    agent.create("c0", &waiting, tokens).await.expect("created");
    let spec = agent.spec("c1", &["true"]);
    // ls itself has the folder open, as descriptor 3.
    assert_eq!(
        output(
            &agent,
            "c1",
            spec,
            "ls -1 /proc/self/fd; ls /proc/self/cwd/"
        )
        .await
        .lines()
        .take(4)
        .collect::<Vec<_>>(),
        ["0", "1", "2", "3"]
    );

    // The end of its input reaches the first one although the second was forked meanwhile.
    let second = agent.spec("c2", &["true"]);
    agent.start_container("c0").await.expect("started");
    agent
        .create("c2", &second, Default::default())
        .await
        .expect("created");
    drop(stdin);
    assert_eq!(common::read_all(stdout).await, "");
    assert_eq!(agent.wait("c0", "").await.expect("waited").exit_status, 0);
    agent.signal("c2", "", 9, false).await.expect("killed");
    agent.wait("c2", "").await.expect("waited");
    for id in ["c0", "c2"] {
        agent.delete(id, "").await.expect("deleted");
    }
    agent.assert_nothing_left();
}

#[tokio::test]
async fn the_guests_mounts_are_gone() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["true"]);
    let mounts = output(&agent, "c1", spec, "cat /proc/self/mountinfo").await;
    let places: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .collect();
    let expected = [
        "/",
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/sys",
    ];
    assert_eq!(
        places.get(..expected.len()),
        Some(&expected[..]),
        "{mounts}"
    );
    assert!(
        places.iter().all(|place| *place == "/"
            || ["/proc", "/dev", "/sys"]
                .iter()
                .any(|root| place.starts_with(root))),
        "{mounts}"
    );
    assert!(
        mounts
            .lines()
            .all(|line| !line.contains("shared:") && !line.contains("master:")),
        "{mounts}"
    );
}

#[tokio::test]
async fn an_images_own_dev_is_completed() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["true"]);
    let spec = with(
        spec,
        "/mounts",
        json!([{"destination": "/proc", "type": "proc"}]),
    );
    std::fs::write(agent.path().join("c1/dev/null"), "not a device").expect("a file");
    symlink("/etc/passwd", agent.path().join("c1/dev/stdout")).expect("a link");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(agent.path().join("c1/dev"), mode).expect("a mode");
    let script = "stat -c %t:%T /dev/null /dev/zero; readlink /dev/stdout";
    assert_eq!(
        output(&agent, "c1", spec, script).await,
        "1:3\n1:5\n/proc/self/fd/1\n"
    );
    agent.assert_nothing_left();
}
