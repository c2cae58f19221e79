//! Connections to servers on the guest's loopback.

mod common;

use bulkhead_proto::guest::FORWARD_OPEN;
use common::{Agent, host_is_able};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

async fn dial(agent: &Agent, port: u16) -> (UnixStream, u8) {
    let socket = agent.path().join("forward.sock");
    let mut stream = UnixStream::connect(socket).await.expect("connected");
    stream.write_all(&port.to_le_bytes()).await.expect("sent");
    let answer = stream.read_u8().await.expect("an answer");
    (stream, answer)
}

#[tokio::test]
async fn a_port_of_either_loopback_is_reached_and_each_direction_ends_by_itself() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address).await else {
            assert!(address.starts_with('['), "no IPv4");
            continue;
        };
        let port = listener.local_addr().expect("an address").port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.expect("its end");
            all.reverse();
            stream.write_all(&all).await.expect("written");
        });
        let (mut stream, answer) = dial(&agent, port).await;
        assert_eq!(answer, FORWARD_OPEN);
        let sent: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
        stream.write_all(&sent).await.expect("sent");
        stream.shutdown().await.expect("ended");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.expect("all of it");
        got.reverse();
        assert!(got == sent, "{} bytes came back", got.len());
        server.await.expect("the server");
    }
}

#[tokio::test]
async fn where_nobody_listens_the_answer_says_so() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    drop(listener);
    let (mut stream, answer) = dial(&agent, port).await;
    assert_ne!(answer, FORWARD_OPEN);
    assert_eq!(stream.read(&mut [0]).await.expect("the end"), 0);
}
