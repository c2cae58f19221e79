//! Connections of the host's to TCP ports of the guest's loopback: how a port of a pod's is reached
//! that only listens there (`FORWARD_PORT` of the contract).

use super::resolver;
use crate::streams::copy_until_end;
use crate::transport::{Endpoint, EndpointKind, Listener};
use bulkhead_proto::guest::{FORWARD_OPEN, RESOLVER};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Connections at once; further ones wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 256;

/// How long a connection may take to name its port.
const UNNAMED: Duration = Duration::from_secs(60);

/// Pause after an accept that failed, so that a lasting failure doesn't become a busy loop.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// The answer where nobody listens.
const REFUSED: u8 = 1;

/// Serves for ever.
pub async fn serve(listener: Listener) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok(host) => {
                tokio::spawn(async move {
                    // The host sees how it ended.
                    let _ = carry(host).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
        }
    }
}

async fn carry(host: Endpoint) -> io::Result<()> {
    let mut port = [0; 2];
    tokio::time::timeout(UNNAMED, host.read_exact(&mut port)).await??;
    let port = u16::from_le_bytes(port);
    if port == RESOLVER {
        return match resolver::bind().await {
            Ok(sockets) => {
                host.write_all(&[FORWARD_OPEN]).await?;
                resolver::serve(host, sockets).await
            }
            Err(_) => host.write_all(&[REFUSED]).await,
        };
    }
    let addresses = [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    ];
    let mut found = None;
    for address in addresses {
        if let Ok(server) = connect(address).await {
            found = Some(server);
            break;
        }
    }
    let Some(server) = found else {
        return host.write_all(&[REFUSED]).await;
    };
    host.write_all(&[FORWARD_OPEN]).await?;
    // One way may end long before the other; an error is the end of both.
    let (there, back) = (
        copy_until_end(&host, &server),
        copy_until_end(&server, &host),
    );
    tokio::try_join!(there, back).map(drop)
}

async fn connect(address: SocketAddr) -> io::Result<Endpoint> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let server = Endpoint::new(socket, EndpointKind::Stream)?;
    server.connected().await?;
    Ok(server)
}
