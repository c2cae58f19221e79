//! The name server that stands for the host's.

mod common;

use bulkhead_proto::guest::{FORWARD_OPEN, RESOLVER, RESOLVER_TCP, RESOLVER_UDP};
use common::{Agent, host_is_able};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket, UnixStream};

const SERVER: &str = "127.0.0.11:53";

/// A query as the host sees it: its number, how it came, and its bytes.
async fn next(host: &mut UnixStream) -> (u32, u8, Vec<u8>) {
    let number = host.read_u32_le().await.expect("a number");
    let kind = host.read_u8().await.expect("a kind");
    let mut query = vec![0; host.read_u16_le().await.expect("a length").into()];
    host.read_exact(&mut query).await.expect("a query");
    (number, kind, query)
}

async fn answer(host: &mut UnixStream, number: u32, bytes: &[u8]) {
    host.write_u32_le(number).await.expect("sent");
    host.write_u16_le(bytes.len() as u16).await.expect("sent");
    host.write_all(bytes).await.expect("sent");
}

#[tokio::test]
async fn queries_go_to_the_host_and_answers_find_who_asked() {
    if !host_is_able() {
        return;
    }
    if let Err(error) = UdpSocket::bind(SERVER).await {
        eprintln!("SKIPPED 1 test: {SERVER} is not to be had here: {error}");
        return;
    }
    let agent = Agent::start().await;
    let socket = agent.path().join("forward.sock");
    let mut host = UnixStream::connect(socket).await.expect("connected");
    host.write_all(&RESOLVER.to_le_bytes()).await.expect("sent");
    assert_eq!(host.read_u8().await.expect("an answer"), FORWARD_OPEN);

    let mut clients = Vec::new();
    for _ in 0..2 {
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        client.connect(SERVER).await.expect("connected");
        clients.push(client);
    }
    clients[0].send(b"first").await.expect("sent");
    let first = next(&mut host).await;
    assert_eq!((first.1, &first.2[..]), (RESOLVER_UDP, &b"first"[..]));
    clients[1].send(b"second").await.expect("sent");
    let second = next(&mut host).await;
    let mut tcp = TcpStream::connect(SERVER).await.expect("connected");
    tcp.write_all(b"\0\x05third").await.expect("sent");
    let third = next(&mut host).await;
    assert_eq!((third.1, &third.2[..]), (RESOLVER_TCP, &b"third"[..]));

    // One that was never asked, and one that can't be answered.
    answer(&mut host, 4711, b"nobody").await;
    answer(&mut host, third.0, b"to the third").await;
    answer(&mut host, second.0, b"to the second").await;
    answer(&mut host, first.0, b"to the first").await;
    let mut buffer = [0; 64];
    for (client, wanted) in clients.iter().zip(["to the first", "to the second"]) {
        let length = client.recv(&mut buffer).await.expect("an answer");
        assert_eq!(&buffer[..length], wanted.as_bytes());
    }
    let length = tcp.read_u16().await.expect("a length");
    let mut got = vec![0; length.into()];
    tcp.read_exact(&mut got).await.expect("an answer");
    assert_eq!(got, b"to the third");

    drop(host);
    // The address is free again.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while UdpSocket::bind(SERVER).await.is_err() {
        assert!(std::time::Instant::now() < end, "it still listens");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
