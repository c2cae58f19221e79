//! Standard streams and terminals.

mod common;

use bulkhead_proto::agent::Streams;
use common::{Agent, host_is_able, read_all, status, with};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

/// Reads until `wanted` has come.
async fn read_until(stream: &mut tokio::net::UnixStream, wanted: &str) -> String {
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while !text.contains(wanted) {
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut buffer)).await;
        let count = read
            .unwrap_or_else(|_| panic!("only {text:?} came"))
            .expect("read");
        assert_ne!(count, 0, "only {text:?} came");
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    text
}

#[tokio::test]
async fn twenty_mebibytes_come_through_unchanged() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["cat"]);
    let (tokens, [stdin, mut stdout, _stderr]) = agent.streams().await;
    agent.create("c1", &spec, tokens).await.expect("created");
    agent.start_container("c1").await.expect("started");
    let sent: Vec<u8> = (0..20u32 << 20)
        .map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8)
        .collect();
    let copy = sent.clone();
    let writer = tokio::spawn(async move {
        let mut stdin = stdin;
        stdin.write_all(&copy).await.expect("written");
    });
    let mut received = Vec::new();
    stdout.read_to_end(&mut received).await.expect("read");
    writer.await.expect("written");
    assert!(received == sent, "{} bytes came", received.len());
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
}

#[tokio::test]
async fn a_slow_reader_holds_the_writer_back() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec(
        "c1",
        &[
            "sh",
            "-c",
            "dd if=/dev/zero bs=65536 count=64 2>/dev/null; echo end >&2",
        ],
    );
    let (tokens, [_stdin, stdout, mut stderr]) = agent.streams().await;
    agent.create("c1", &spec, tokens).await.expect("created");
    agent.start_container("c1").await.expect("started");
    let early = tokio::time::timeout(Duration::from_millis(300), stderr.read_u8()).await;
    assert!(
        early.is_err(),
        "4 MiB went somewhere although no one reads them"
    );
    assert_eq!(read_all(stdout).await.len(), 4 << 20);
    assert_eq!(read_all(stderr).await, "end\n");
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_host_that_stops_listening_ends_the_writer() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec(
        "c1",
        &["sh", "-c", "while true; do echo line || exit 1; done"],
    );
    let (tokens, streams) = agent.streams().await;
    agent.create("c1", &spec, tokens).await.expect("created");
    drop(streams);
    agent.start_container("c1").await.expect("started");
    let exit = agent.wait("c1", "").await.expect("waited").exit_status;
    // The shell's own SIGPIPE, or the failure of its echo where that is caught.
    assert!(exit == 141 || exit == 1, "{exit}");
    agent.delete("c1", "").await.expect("deleted");
}

#[tokio::test]
async fn the_connection_may_come_after_the_request() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["echo", "late"]);
    // The token that dial will use next.
    let streams = Streams {
        stdout_token: 1,
        ..Default::default()
    };
    let (created, (token, stdout)) = tokio::join!(agent.create("c1", &spec, streams), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        agent.dial().await
    });
    assert_eq!(token, 1);
    created.expect("created");
    agent.start_container("c1").await.expect("started");
    assert_eq!(read_all(stdout).await, "late\n");
    let twice = Streams {
        stdout_token: 9,
        stderr_token: 9,
        ..Default::default()
    };
    assert_eq!(
        status(agent.create("c2", &spec, twice).await).0,
        Code::INVALID_ARGUMENT
    );
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
}

#[tokio::test]
async fn the_streams_of_a_failed_request_are_closed() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["nope"]);
    let (tokens, [stdin, stdout, stderr]) = agent.streams().await;
    assert_eq!(
        status(agent.create("c1", &spec, tokens).await).0,
        Code::NOT_FOUND
    );
    let (tokens, [_, refused, _]) = agent.streams().await;
    let unread = with(spec, "/ociVersion", json!("9"));
    // Once the agent has certainly seen the connections.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(
        status(agent.create("c1", &unread, tokens).await).0,
        Code::INVALID_ARGUMENT
    );
    for stream in [stdin, stdout, stderr, refused] {
        let text = tokio::time::timeout(Duration::from_secs(10), read_all(stream)).await;
        assert_eq!(text.as_deref(), Ok(""));
    }
}

#[tokio::test]
async fn a_terminal_is_one() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec(
        "c1",
        &[
            "sh",
            "-c",
            "tty; stty size; stat -c %t:%T /dev/console; cat; echo end",
        ],
    );
    let spec = with(spec, "/process/terminal", json!(true));
    let (stdin_token, mut stdin) = agent.dial().await;
    let (stdout_token, mut stdout) = agent.dial().await;
    let tokens = Streams {
        stdin_token,
        stdout_token,
        ..Default::default()
    };
    agent.create("c1", &spec, tokens).await.expect("created");
    agent.start_container("c1").await.expect("started");
    // Unix 98 slaves have major number 136.
    let shown = read_until(&mut stdout, "88:0\r\n").await;
    assert_eq!(shown, "/dev/pts/0\r\n33 101\r\n88:0\r\n");
    agent.resize("c1", "", 40, 120).await.expect("resized");
    assert_eq!(
        status(agent.resize("c1", "", 70_000, 1).await).0,
        Code::INVALID_ARGUMENT
    );
    stdin.write_all(b"typed\n").await.expect("written");
    assert_eq!(
        read_until(&mut stdout, "typed\r\ntyped\r\n").await,
        "typed\r\ntyped\r\n"
    );

    let process = json!({"args": ["sh", "-c", "tty; stty size </dev/console"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, "terminal": true});
    let (token, further) = agent.dial().await;
    let streams = Streams {
        stdout_token: token,
        ..Default::default()
    };
    agent
        .exec("c1", "e1", &process, streams)
        .await
        .expect("executed");
    assert_eq!(read_all(further).await, "/dev/pts/1\r\n40 120\r\n");
    agent.wait("c1", "e1").await.expect("waited");

    // Control-D, as typed by a user; then the end of the terminal is the end of the stream.
    stdin.write_all(b"\x04").await.expect("written");
    assert_eq!(read_all(stdout).await, "end\r\n");
    assert_eq!(agent.wait("c1", "").await.expect("waited").exit_status, 0);
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn interrupting_reaches_the_foreground_of_a_terminal() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec(
        "c1",
        &[
            "sh",
            "-c",
            "trap 'echo caught; exit 3' INT; echo ready; while true; do sleep 0.05; done",
        ],
    );
    let spec = with(spec, "/process/terminal", json!(true));
    // Without a devpts in the spec the agent adds the one that a terminal needs.
    let mut spec = spec;
    spec["mounts"]
        .as_array_mut()
        .expect("mounts")
        .retain(|mount| mount["destination"] != "/dev/pts");
    let (stdin_token, mut stdin) = agent.dial().await;
    let (stdout_token, mut stdout) = agent.dial().await;
    let tokens = Streams {
        stdin_token,
        stdout_token,
        ..Default::default()
    };
    agent.create("c1", &spec, tokens).await.expect("created");
    agent.start_container("c1").await.expect("started");
    read_until(&mut stdout, "ready").await;
    stdin.write_all(b"\x03").await.expect("written");
    assert!(read_all(stdout).await.contains("caught"));
    assert_eq!(agent.wait("c1", "").await.expect("waited").exit_status, 3);
    agent.delete("c1", "").await.expect("deleted");
}

#[tokio::test]
async fn a_hundred_at_once_and_hundreds_in_a_row() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["sleep", "1000"]);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c1").await.expect("started");
    let process = json!({"args": ["sh", "-c", "cat; exit 5"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{}/fd", agent.pid()))
            .expect("descriptors")
            .count()
    };
    let before = descriptors();
    for round in 0..2 {
        let mut inputs = Vec::new();
        for number in 0..170 {
            let id = format!("e{round}-{number}");
            let (tokens, streams) = agent.streams().await;
            agent
                .exec("c1", &id, &process, tokens)
                .await
                .expect("executed");
            inputs.push((id, streams));
        }
        for (id, [mut stdin, stdout, _stderr]) in inputs {
            stdin.write_all(id.as_bytes()).await.expect("written");
            drop(stdin);
            assert_eq!(read_all(stdout).await, id);
            assert_eq!(agent.wait("c1", &id).await.expect("waited").exit_status, 5);
            agent.delete("c1", &id).await.expect("deleted");
        }
    }
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while descriptors() > before {
        assert!(
            std::time::Instant::now() < deadline,
            "{} descriptors instead of {before}",
            descriptors()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent.signal("c1", "", 9, true).await.expect("killed");
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}
