//! User namespaces of real containers.

mod common;

use common::{Agent, host_is_able, read_all, status, with};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tokio::io::AsyncWriteExt;
use ttrpc::Code;

/// The first of the guest's ids that containers here have.
const FIRST: u32 = 100_000;

/// A spec with a user namespace, and a rootfs that belongs to its root.
fn mapped(agent: &Agent, id: &str, args: &[&str]) -> Value {
    let spec = agent.spec(id, args);
    give(&agent.path().join(id));
    let maps = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    let spec = with(spec, "/linux/uidMappings", maps.clone());
    let spec = with(spec, "/linux/gidMappings", maps);
    with(spec, "/linux/namespaces/-", json!({"type": "user"}))
}

fn give(path: &Path) {
    std::os::unix::fs::lchown(path, Some(FIRST), Some(FIRST)).expect("an owner");
    if path.is_dir() && !path.is_symlink() {
        for entry in std::fs::read_dir(path).expect("a folder").flatten() {
            give(&entry.path());
        }
    }
}

#[tokio::test]
async fn root_of_a_container_is_nobody_in_the_guest() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    // Spares belong to the guest's own users and aren't for this one.
    agent.prepare().await.expect("prepared");
    agent.identify(&[7; 16]).await.expect("identified");
    let volume = agent.path().join("volume");
    std::fs::create_dir(&volume).expect("a folder");
    give(&volume);
    let script = "id -u; cat /proc/self/uid_map; echo x > /vol/file; echo y > /dev/null && echo z > /dev/stdout; ip -o link show up | head -c 6; echo; hostname; touch /proc/sys/x 2>/dev/null || echo kept; ls -ln /vol/file | wc -l; cat";
    let spec = mapped(&agent, "c1", &["sh", "-c", script]);
    let bind =
        json!({"destination": "/vol", "type": "bind", "source": volume, "options": ["rbind"]});
    let spec = with(spec, "/mounts/-", bind);
    let spec = with(spec, "/process/oomScoreAdj", json!(5));
    let (tokens, [stdin, stdout, stderr]) = agent.streams().await;
    let pid = agent.create("c1", &spec, tokens).await.expect("created");
    let process = std::fs::metadata(format!("/proc/{pid}/cwd/")).map(|_| ());
    assert!(process.is_ok(), "it waits");
    let status_file = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    let uids = format!("Uid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}\n");
    assert!(status_file.contains(&uids), "{status_file}");
    let score = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("a score");
    assert_eq!(score, "5\n");
    agent.start_container("c1").await.expect("started");

    let script =
        "id -u; id -g; cat /proc/self/uid_map; echo ok > /dev/stdout; kill -0 1 && echo seen";
    let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 1000, "gid": 1001}});
    let (exec_tokens, [_stdin, exec_stdout, exec_stderr]) = agent.streams().await;
    agent
        .exec("c1", "e1", &process, exec_tokens)
        .await
        .expect("executed");
    let map = format!("         0     {FIRST}      65536\n");
    let err = read_all(exec_stderr).await;
    assert_eq!(
        read_all(exec_stdout).await,
        format!("1000\n1001\n{map}ok\n"),
        "{err}"
    );
    let strange = with(process, "/user/uid", json!(70_000));
    let (code, message) = status(agent.exec("c1", "e2", &strange, Default::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("70000"), "{message}");

    drop(stdin);
    let err = read_all(stderr).await;
    assert_eq!(
        read_all(stdout).await,
        format!("0\n{map}z\n1: lo:\ninside\nkept\n1\n"),
        "{err}"
    );
    let written = std::fs::metadata(volume.join("file")).expect("a file");
    assert_eq!((written.uid(), written.gid()), (FIRST, FIRST));
    assert_eq!(agent.wait("c1", "").await.expect("waited").exit_status, 0);
    agent.delete("c1", "").await.expect("deleted");
}

#[tokio::test]
async fn a_terminal_belongs_to_the_containers_root() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = mapped(
        &agent,
        "c1",
        &[
            "sh",
            "-c",
            "stat -c %u $(tty); echo here > /dev/console; cat",
        ],
    );
    let spec = with(spec, "/process/terminal", json!(true));
    let (stdin_token, mut stdin) = agent.dial().await;
    let (stdout_token, stdout) = agent.dial().await;
    let streams = bulkhead_proto::agent::Streams {
        stdin_token,
        stdout_token,
        ..Default::default()
    };
    agent.create("c1", &spec, streams).await.expect("created");
    agent.start_container("c1").await.expect("started");
    stdin.write_all(b"\x04").await.expect("written");
    let out = read_all(stdout).await;
    assert!(out.starts_with("0\r\nhere\r\n"), "{out}");
    assert_eq!(agent.wait("c1", "").await.expect("waited").exit_status, 0);
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn its_own_administrator_cannot_make_read_only_mounts_writable() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let volume = agent.path().join("volume");
    std::fs::create_dir(&volume).expect("a folder");
    std::fs::write(volume.join("file"), "as it was\n").expect("a file");
    give(&volume);
    let script = "for place in /ro /deep /file; do mount -o remount,bind,rw none $place && echo $place is writable; done; \
        echo x > /file; touch /ro/x /deep/x; mount -o remount,bind,rw none /rw && mount -o remount,bind,ro none /rw && echo may; cat /file";
    let mut spec = mapped(&agent, "c1", &["sh", "-c", script]);
    for (place, source, options) in [
        ("/ro", "volume", json!(["bind", "ro", "nosuid"])),
        ("/deep", "volume", json!(["rbind", "rro"])),
        ("/file", "volume/file", json!(["bind", "ro"])),
        ("/rw", "volume", json!(["bind"])),
    ] {
        let source = agent.path().join(source);
        let mount =
            json!({"destination": place, "type": "bind", "source": source, "options": options});
        spec = with(spec, "/mounts/-", mount);
    }
    let all = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    let spec = with(
        spec,
        "/process/capabilities",
        json!({"bounding": all, "effective": all, "permitted": all}),
    );
    let (code, out, err) = agent.run("c1", &spec).await;
    // It is the administrator of its mounts: what it was given without a limit it may limit.
    assert_eq!((code, out.as_str()), (0, "may\nas it was\n"), "{err}");
    assert!(!volume.join("x").exists());
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_pods_ipc_comes_with_its_message_queues() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let mut spec = mapped(&agent, "c1", &["grep", " /dev/mqueue ", "/proc/mounts"]);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.retain(|namespace| namespace["type"] != "ipc");
    let mount = json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
        "options": ["nosuid", "noexec", "nodev"]});
    let spec = with(spec, "/mounts/-", mount);
    let (code, out, err) = agent.run("c1", &spec).await;
    assert_eq!(code, 0, "{out} {err}");
    let options = out.split_whitespace().nth(3).unwrap_or_default();
    for option in ["nosuid", "noexec", "nodev"] {
        assert!(options.split(',').any(|one| one == option), "{out}");
    }
    agent.assert_nothing_left();
}

#[tokio::test]
async fn refusals_leave_nothing() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = mapped(&agent, "c1", &["true"]);
    let overlapping = json!([
        {"containerID": 0, "hostID": FIRST, "size": 10},
        {"containerID": 5, "hostID": FIRST, "size": 10},
    ]);
    for (pointer, value, words) in [
        ("/linux/uidMappings", overlapping, "linux.uidMappings"),
        ("/linux/gidMappings", json!([]), "linux.gidMappings"),
        ("/process/user/uid", json!(70_000), "process.user.uid"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 99_999_999_999u64}]),
            "process.rlimits",
        ),
    ] {
        let spec = with(spec.clone(), pointer, value);
        let (_, message) = status(agent.create("c1", &spec, Default::default()).await);
        assert!(message.contains(words), "{pointer}: {message}");
        agent.assert_nothing_left();
    }
}
