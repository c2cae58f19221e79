//! The pod's loopback, seen from the host: a connection to any TCP port of it in the pod's network
//! namespace, which is where kubectl port-forward arrives, reaches the same port in the guest.

use super::netns::Netns;
use super::sk_lookup::Steering;
use crate::guest::Guest;
use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Connections at once; further ones wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 128;

/// Pause after an accept that failed, so that a lasting failure doesn't become a busy loop.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// Takes the connections of a pod, until it's dropped.
pub(super) struct Forwarder {
    _steering: Steering,
    _listeners: JoinSet<()>,
}

impl Forwarder {
    /// Must be called on the runtime.
    pub fn start(netns: &Netns, guest: &Arc<Guest>) -> io::Result<Self> {
        let (ip4, ip6) = netns.inside(|| {
            // Which port is of no account: connections to any are steered here.
            let ip4 = StdListener::bind("127.0.0.1:0")?;
            // There may be no IPv6 in the namespace.
            Ok::<_, io::Error>((ip4, StdListener::bind("[::1]:0").ok()))
        })??;
        let steering = Steering::attach(netns, &ip4, ip6.as_ref())?;
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut listeners = JoinSet::new();
        for listener in std::iter::once(ip4).chain(ip6) {
            listener.set_nonblocking(true)?;
            let listener = TcpListener::from_std(listener)?;
            listeners.spawn(accept(listener, guest.clone(), connections.clone()));
        }
        Ok(Self {
            _steering: steering,
            _listeners: listeners,
        })
    }
}

async fn accept(listener: TcpListener, guest: Arc<Guest>, connections: Arc<Semaphore>) {
    // With this task its connections end.
    let mut carried = JoinSet::new();
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else {
            return;
        };
        while carried.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((client, _)) => {
                let guest = guest.clone();
                carried.spawn(async move {
                    carry(client, &guest).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "taking a connection to the pod's loopback failed");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn carry(mut client: TcpStream, guest: &Guest) {
    // Not the listener's: steering leaves a connection the address that was asked for.
    let Ok(port) = client.local_addr().map(|address| address.port()) else {
        return;
    };
    match guest.open_forward(port).await {
        // How it ends is between the two ends.
        Ok(mut server) => drop(copy_bidirectional(&mut client, &mut server).await),
        Err(error) => {
            tracing::debug!(%error, port, "no connection to the guest's loopback");
            // It's too late to refuse; a reset is the next best.
            let reset = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            let _ = setsockopt(&client, sockopt::Linger, &reset);
        }
    }
}
