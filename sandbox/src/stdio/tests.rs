use super::*;
use crate::pace::Pace;
use bulkhead_proto::vmm::KvmKind;
use nix::sys::stat::Mode;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

fn fifo(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
    path
}

fn paths(stdin: &str, stdout: &str) -> StdioPaths {
    StdioPaths {
        stdin: stdin.into(),
        stdout: stdout.into(),
        stderr: String::new(),
        terminal: false,
    }
}

/// Copies as `HostEnds::connect` sets them up, with socket pairs in the guest's place.
fn connect(ends: HostEnds) -> (Copies, Vec<UnixStream>) {
    let mut copies = Copies::new(Pace::of(KvmKind::Vmx));
    let mut guest = Vec::new();
    if let Some((source, keeper)) = ends.stdin {
        let (near, far) = UnixStream::pair().unwrap();
        copies.input(source, keeper, near);
        guest.push(far);
    }
    for sink in [ends.stdout, ends.stderr].into_iter().flatten() {
        let (near, far) = UnixStream::pair().unwrap();
        copies.output(near, sink);
        guest.push(far);
    }
    copies.logger(ends.logger);
    (copies, guest)
}

async fn open_ends(paths: &StdioPaths) -> HostEnds {
    let namespace = Namespace::try_from("ns").unwrap();
    Stdio::parse(paths)
        .unwrap()
        .open("c1", &namespace)
        .await
        .unwrap()
}

#[tokio::test]
async fn only_close_io_ends_the_input() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let ends = open_ends(&paths(path.to_str().unwrap(), "")).await;
    let (mut copies, mut guest) = connect(ends);
    let mut received = [0; 3];
    for word in ["one", "two"] {
        // Each client attaches, writes and detaches.
        let mut client = pipe::OpenOptions::new().open_sender(&path).unwrap();
        client.write_all(word.as_bytes()).await.unwrap();
        drop(client);
        guest[0].read_exact(&mut received).await.unwrap();
        assert_eq!(received, word.as_bytes());
    }
    let more = tokio::time::timeout(Duration::from_millis(100), guest[0].read(&mut received)).await;
    assert!(more.is_err(), "a detach is no end of input");
    copies.close_stdin();
    assert_eq!(guest[0].read(&mut received).await.unwrap(), 0);
}

#[tokio::test]
async fn output_survives_a_client_that_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let first = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let (copies, mut guest) = connect(open_ends(&paths("", path.to_str().unwrap())).await);
    drop(first);
    guest[0].write_all(b"while nobody reads").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut second = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    guest.clear();
    copies.drain().await;
    let mut text = String::new();
    second.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "while nobody reads");
}

#[tokio::test]
async fn a_drain_waits_for_a_slow_reader_but_not_for_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let (copies, mut guest) = connect(open_ends(&paths("", path.to_str().unwrap())).await);
    let sent = vec![7; 1 << 20];
    let length = sent.len();
    let writer = tokio::spawn(async move {
        guest[0].write_all(&sent).await.unwrap();
    });
    let slow = tokio::spawn(async move {
        let mut chunk = vec![0; 48 * 1024];
        let mut total = 0;
        loop {
            match reader.read(&mut chunk).await.unwrap() {
                0 => return total,
                length => total += length,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    copies.drain().await;
    writer.await.unwrap();
    assert_eq!(slow.await.unwrap(), length);

    let stuck = fifo(dir.path(), "stuck");
    let (copies, mut guest) = connect(open_ends(&paths("", stuck.to_str().unwrap())).await);
    let writer = tokio::spawn(async move {
        let _ = guest[0].write_all(&vec![7; 1 << 20]).await;
    });
    let begin = Instant::now();
    copies.drain().await;
    assert!(
        begin.elapsed() < Duration::from_secs(6),
        "{:?}",
        begin.elapsed()
    );
    writer.await.unwrap();
}

#[tokio::test]
async fn a_file_is_made_and_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("logs/out.log");
    let uri = format!("file://{}", file.display());
    for _ in 0..2 {
        let (copies, mut guest) = connect(open_ends(&paths("", &uri)).await);
        guest[0].write_all(b"line\n").await.unwrap();
        drop(guest);
        copies.drain().await;
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "line\nline\n");
}

#[tokio::test]
async fn a_log_program_gets_the_output_and_the_containers_name() {
    let dir = tempfile::tempdir().unwrap();
    let (script, log) = (dir.path().join("log.sh"), dir.path().join("log"));
    let text = format!(
        "#!/bin/sh\nexec 5>&-\necho $CONTAINER_NAMESPACE/$CONTAINER_ID $* > {0}\ncat <&3 >> {0}\n",
        log.display()
    );
    let draft = dir.path().join("draft");
    std::fs::write(&draft, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&draft, mode).unwrap();
    // Copied by another process: what this one has open for writing, a program that another test
    // is just starting may have too, and then it can't be executed (ETXTBSY).
    let copied = std::process::Command::new("cp")
        .args([&draft, &script])
        .status();
    assert!(copied.unwrap().success());
    let uri = format!("binary://{}?key=value", script.display());
    let (copies, mut guest) = connect(open_ends(&paths("", &uri)).await);
    guest[0].write_all(b"hello\n").await.unwrap();
    drop(guest);
    copies.drain().await;
    assert_eq!(
        std::fs::read_to_string(&log).unwrap(),
        "ns/c1 key value\nhello\n"
    );
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let namespace = Namespace::try_from("ns").unwrap();
    for uri in ["/nonexistent/fifo", "binary:///nonexistent/logger"] {
        let stdio = Stdio::parse(&paths("", uri)).unwrap();
        let error = stdio
            .open("c1", &namespace)
            .await
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("/nonexistent/"), "{error}");
    }
}
