//! A name server on the guest's loopback that stands for one in the pod's network namespace on the
//! host (`RESOLVER` of the contract): Docker has one there, at the same address.
//!
//! Queries are handed to the host one after the other, each with a number, and answers come back in
//! any order. Nobody but the containers of the guest can ask here.

use crate::transport::Endpoint;
use bulkhead_proto::guest::{
    RESOLVER_ADDRESS, RESOLVER_ANSWER_HEADER, RESOLVER_PORT, RESOLVER_TCP, RESOLVER_UDP,
};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

/// Queries under way. Those beyond that are forgotten, and clients ask again.
const MAX_QUERIES: usize = 256;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Connections of clients at once, and how long one may be silent.
const MAX_CLIENTS: usize = 32;
const SILENCE: Duration = Duration::from_secs(30);

/// A query that came over a connection, and where its answer goes.
type Asked = (Vec<u8>, oneshot::Sender<Vec<u8>>);

/// Who waits for an answer.
enum Client {
    Udp(SocketAddr),
    Tcp(oneshot::Sender<Vec<u8>>),
}

/// The sockets at the name server's address.
pub async fn bind() -> io::Result<(UdpSocket, TcpListener)> {
    let address = (RESOLVER_ADDRESS, RESOLVER_PORT);
    Ok((
        UdpSocket::bind(address).await?,
        TcpListener::bind(address).await?,
    ))
}

/// Serves on the sockets of [`bind`] until the host ends the connection.
pub async fn serve(host: Endpoint, (udp, tcp): (UdpSocket, TcpListener)) -> io::Result<()> {
    let host = Arc::new(host);
    let (give, mut answers) = mpsc::channel(1);
    let (ask, mut asked) = mpsc::channel(1);
    // Both end with this one.
    let mut helpers = JoinSet::new();
    helpers.spawn(listen(host.clone(), give));
    helpers.spawn(accept(tcp, ask));
    let mut waiting = Waiting::default();
    let mut query = vec![0; usize::from(u16::MAX)];
    loop {
        tokio::select! {
            received = udp.recv_from(&mut query) => {
                // An error is that of an earlier answer, which had nobody to go to.
                let Ok((length, from)) = received else { continue };
                let Some(number) = waiting.add(Client::Udp(from)) else { continue };
                send(&host, number, RESOLVER_UDP, &query[..length]).await?;
            }
            Some((query, answer)) = asked.recv() => {
                let Some(number) = waiting.add(Client::Tcp(answer)) else { continue };
                send(&host, number, RESOLVER_TCP, &query).await?;
            }
            answer = answers.recv() => {
                let Some((number, answer)) = answer else { return Ok(()) };
                match waiting.clients.remove(&number) {
                    Some((Client::Udp(to), _)) if !answer.is_empty() => {
                        // A client that has gone is nobody's loss.
                        let _ = udp.send_to(&answer, to).await;
                    }
                    Some((Client::Tcp(to), _)) => drop(to.send(answer)),
                    _ => {}
                }
            }
        }
    }
}

/// Clients by the number of their query.
#[derive(Default)]
struct Waiting {
    clients: HashMap<u32, (Client, Instant)>,
    next: u32,
}

impl Waiting {
    /// None if there are too many.
    fn add(&mut self, client: Client) -> Option<u32> {
        if self.clients.len() >= MAX_QUERIES {
            self.clients
                .retain(|_, (_, since)| since.elapsed() < PATIENCE);
            if self.clients.len() >= MAX_QUERIES {
                return None;
            }
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.clients.insert(number, (client, Instant::now()));
        Some(number)
    }
}

async fn send(host: &Endpoint, number: u32, kind: u8, query: &[u8]) -> io::Result<()> {
    let Ok(length) = u16::try_from(query.len()) else {
        return Ok(());
    };
    let mut message = number.to_le_bytes().to_vec();
    message.push(kind);
    message.extend(length.to_le_bytes());
    message.extend(query);
    host.write_all(&message).await
}

/// Hands answers on until there are no more.
async fn listen(host: Arc<Endpoint>, give: mpsc::Sender<(u32, Vec<u8>)>) {
    let mut header = [0; RESOLVER_ANSWER_HEADER];
    while host.read_exact(&mut header).await.is_ok() {
        let [a, b, c, d, low, high] = header;
        let mut answer = vec![0; u16::from_le_bytes([low, high]).into()];
        if host.read_exact(&mut answer).await.is_err()
            || give
                .send((u32::from_le_bytes([a, b, c, d]), answer))
                .await
                .is_err()
        {
            return;
        }
    }
}

async fn accept(listener: TcpListener, ask: mpsc::Sender<Asked>) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut served = JoinSet::new();
    while let Ok(permit) = clients.clone().acquire_owned().await {
        while served.try_join_next().is_some() {}
        if let Ok((client, _)) = listener.accept().await {
            let ask = ask.clone();
            served.spawn(async move {
                // The client sees how it ended.
                let _ = converse(client, ask).await;
                drop(permit);
            });
        }
    }
}

/// Queries and answers, each behind its length (RFC 1035, section 4.2.2).
async fn converse(mut client: TcpStream, ask: mpsc::Sender<Asked>) -> io::Result<()> {
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    loop {
        let length = tokio::time::timeout(SILENCE, client.read_u16()).await??;
        let mut query = vec![0; length.into()];
        tokio::time::timeout(SILENCE, client.read_exact(&mut query)).await??;
        let (answer, answered) = oneshot::channel();
        ask.send((query, answer)).await.map_err(|_| gone())?;
        let answer = tokio::time::timeout(PATIENCE, answered).await?;
        let answer = answer.map_err(|_| gone())?;
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        client.write_u16(length).await?;
        client.write_all(&answer).await?;
    }
}
