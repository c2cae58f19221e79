//! Docker's name server for containers of user-defined networks: it listens in the container's
//! network namespace on the loopback, where a guest has another one. While it's there, the agent
//! has one at the same address, whose queries are asked here (`RESOLVER` of the contract).

use super::netns::Netns;
use crate::guest::{AgentError, Guest};
use bulkhead_proto::guest::{RESOLVER_ADDRESS, RESOLVER_QUERY_HEADER, RESOLVER_TCP};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

/// Queries under way; each is a thread for that long.
const MAX_QUERIES: usize = 32;
/// How long the name server may take, which may have to ask others.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ports of a name server. A daemon that is started anew gives it others, of which nobody tells: so
/// they are looked up for each query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Server {
    udp: u16,
    tcp: Option<u16>,
}

/// Sees whether there is a name server, and has the guest ask it.
pub(super) struct Resolver {
    netns: Netns,
    guest: Arc<Guest>,
    /// The task that asks, as long as there is a server.
    asking: Option<JoinSet<()>>,
}

impl Resolver {
    /// In the VM's namespace. Nobody is asked before [`Resolver::look`].
    pub fn new(netns: Netns, guest: Arc<Guest>) -> Self {
        Self {
            netns,
            guest,
            asking: None,
        }
    }

    /// Looks again. Must be called on the runtime.
    pub async fn look(&mut self) -> Result<(), AgentError> {
        let found = self.netns.later(Server::here).await;
        let found = found.ok().flatten();
        if let Some(task) = &mut self.asking
            && found.is_some()
            && task.try_join_next().is_none()
        {
            return Ok(());
        }
        // The guest's end goes with its connection.
        self.asking = None;
        let Some(server) = found else {
            return Ok(());
        };
        let agent = self.guest.open_resolver().await?;
        let mut task = JoinSet::new();
        task.spawn(serve(agent, self.netns.clone()));
        self.asking = Some(task);
        tracing::info!(?server, "the guest asks the namespace's name server");
        Ok(())
    }
}

impl Server {
    /// In the calling thread's network namespace: what has its sockets on the address that Docker's
    /// has, whose port is any. (Rules of a packet filter lead there from port 53.)
    fn here() -> Option<Self> {
        let table = |name: &str| {
            std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default()
        };
        Some(Self {
            udp: listener(&table("udp"))?,
            tcp: listener(&table("tcp")),
        })
    }

    fn address(self, kind: u8) -> io::Result<SocketAddr> {
        let port = match kind {
            RESOLVER_TCP => self.tcp,
            _ => Some(self.udp),
        };
        let port = port.ok_or(io::ErrorKind::ConnectionRefused)?;
        Ok((RESOLVER_ADDRESS, port).into())
    }
}

/// The port of the first socket in a table of proc(5)'s `net/udp` or `net/tcp` that is on the name
/// server's address and connected to nobody.
fn listener(table: &str) -> Option<u16> {
    table.lines().skip(1).find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, remote) = (words.next()?, words.next()?);
        let (address, port) = local.split_once(':')?;
        // In the machine's byte order.
        let address = u32::from_str_radix(address, 16).ok()?.to_ne_bytes();
        let free = remote == "00000000:0000";
        let port = u16::from_str_radix(port, 16).ok()?;
        (free && Ipv4Addr::from(address) == RESOLVER_ADDRESS).then_some(port)
    })
}

/// Asks what the agent sends, until it ends.
async fn serve(agent: UnixStream, netns: Netns) {
    let (mut queries, mut back) = agent.into_split();
    let (done, mut answers) = mpsc::channel::<Vec<u8>>(1);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(answer) = answers.recv().await {
            if back.write_all(&answer).await.is_err() {
                return;
            }
        }
    });
    let free = Arc::new(Semaphore::new(MAX_QUERIES));
    while let Ok(permit) = free.clone().acquire_owned().await {
        let Ok((number, kind, query)) = next(&mut queries).await else {
            return;
        };
        while tasks.try_join_next().is_some() {}
        let (netns, done) = (netns.clone(), done.clone());
        tasks.spawn(async move {
            let answer = netns.later(move || ask(kind, &query)).await;
            let answer = answer.flatten().unwrap_or_else(|error| {
                tracing::debug!(%error, "a name was not asked for");
                Vec::new()
            });
            let mut message = number.to_le_bytes().to_vec();
            // No answer is longer.
            message.extend((answer.len() as u16).to_le_bytes());
            message.extend(answer);
            let _ = done.send(message).await;
            drop(permit);
        });
    }
}

async fn next(queries: &mut OwnedReadHalf) -> io::Result<(u32, u8, Vec<u8>)> {
    let mut header = [0; RESOLVER_QUERY_HEADER];
    queries.read_exact(&mut header).await?;
    let [a, b, c, d, kind, low, high] = header;
    let mut query = vec![0; u16::from_le_bytes([low, high]).into()];
    queries.read_exact(&mut query).await?;
    Ok((u32::from_le_bytes([a, b, c, d]), kind, query))
}

/// In the namespace, and on a thread that may wait.
fn ask(kind: u8, query: &[u8]) -> io::Result<Vec<u8>> {
    let server = Server::here().ok_or(io::ErrorKind::ConnectionRefused)?;
    let address = server.address(kind)?;
    if kind == RESOLVER_TCP {
        return ask_by_tcp(address, query);
    }
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(query)?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

/// Messages have their length in front (RFC 1035, section 4.2.2).
fn ask_by_tcp(address: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // No query is longer.
    let length = query.len() as u16;
    stream.write_all(&[&length.to_be_bytes(), query].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_found_by_its_address() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue\n";
        let line = |local: &str, remote: &str| format!("   1: {local} {remote} 07 00000000\n");
        let other = line("0100007F:0035", "00000000:0000");
        let client = line("0B00007F:9C41", "0B00007F:0035");
        let server = line("0B00007F:8A2F", "00000000:0000");
        assert_eq!(
            listener(&format!("{head}{other}{client}{server}")),
            Some(0x8a2f)
        );
        assert_eq!(listener(&format!("{head}{other}{client}")), None);
        assert_eq!(listener(""), None);
    }

    /// A name server, in the calling thread's namespace, that answers once by each way: the query
    /// backwards.
    fn server() -> Server {
        let udp = UdpSocket::bind((RESOLVER_ADDRESS, 0)).unwrap();
        let tcp = std::net::TcpListener::bind((RESOLVER_ADDRESS, 0)).unwrap();
        let server = Server {
            udp: udp.local_addr().unwrap().port(),
            tcp: Some(tcp.local_addr().unwrap().port()),
        };
        std::thread::spawn(move || {
            let mut query = [0; 16];
            let (length, from) = udp.recv_from(&mut query).unwrap();
            query[..length].reverse();
            udp.send_to(&query[..length], from).unwrap();
            let (mut stream, _) = tcp.accept().unwrap();
            let mut query = [0; 5];
            stream.read_exact(&mut query).unwrap();
            query[2..].reverse();
            stream.write_all(&query).unwrap();
        });
        server
    }

    #[test]
    fn both_ways_of_asking_get_their_answer_from_whoever_serves_now() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED 1 test: it needs root");
            return;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let mut up = std::process::Command::new("ip");
        assert!(
            up.args(["link", "set", "lo", "up"])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(Server::here(), None);
        assert!(ask(0, b"abc").is_err());
        // The second time as after a start of the daemon: other ports.
        for _ in 0..2 {
            let server = server();
            assert_eq!(Server::here(), Some(server));
            assert_eq!(ask(0, b"abc").unwrap(), b"cba");
            assert_eq!(ask(RESOLVER_TCP, b"def").unwrap(), b"fed");
            let end = std::time::Instant::now() + PATIENCE;
            while Server::here().is_some() {
                assert!(std::time::Instant::now() < end, "the server stays");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
