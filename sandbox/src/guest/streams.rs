//! Connections that carry bytes: standard streams, forwarded ports, the pod's name server.

use super::Guest;
use super::dial::dial;
use super::error::{AgentError, AgentResult};
use crate::Kind;
use bulkhead_proto::agent::Streams;
use bulkhead_proto::guest::{FORWARD_OPEN, FORWARD_PORT, RESOLVER, RESOLVER_ADDRESS, STREAM_PORT};
use std::io;
use std::sync::atomic::Ordering;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// A standard stream's connection, and the token that names it to the agent.
pub(crate) struct Stream {
    pub token: u64,
    pub socket: UnixStream,
}

impl Guest {
    /// Opens a stream to the guest.
    pub async fn open_stream(&self) -> AgentResult<Stream> {
        let call = "open stream";
        let mut socket = dial(&self.vsock, STREAM_PORT, call, &self.vmm, self.pace).await?;
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let broken = |cause: io::Error| AgentError::Broken {
            call,
            cause: cause.to_string(),
        };
        socket
            .write_all(&token.to_le_bytes())
            .await
            .map_err(broken)?;
        Ok(Stream { token, socket })
    }

    /// Opens a connection to a TCP port of the guest's loopback.
    pub async fn open_forward(&self, port: u16) -> AgentResult<UnixStream> {
        let nobody = format!("nobody listens on port {port} of the guest's loopback");
        self.open(port, nobody).await
    }

    /// Has the agent be a name server in the guest as long as the connection lasts.
    pub async fn open_resolver(&self) -> AgentResult<UnixStream> {
        let taken = format!("the guest has no room for a name server at {RESOLVER_ADDRESS}");
        self.open(RESOLVER, taken).await
    }

    async fn open(&self, port: u16, refusal: String) -> AgentResult<UnixStream> {
        let call = "connect to the guest's loopback";
        let mut socket = dial(&self.vsock, FORWARD_PORT, call, &self.vmm, self.pace).await?;
        let limit = self.pace.call();
        let asked = timeout(limit, async {
            socket.write_all(&port.to_le_bytes()).await?;
            socket.read_u8().await
        });
        match asked.await {
            Ok(Ok(FORWARD_OPEN)) => Ok(socket),
            Ok(Ok(_)) => Err(AgentError::Refused {
                kind: Kind::NotFound,
                message: refusal,
            }),
            Ok(Err(cause)) => Err(AgentError::Broken {
                call,
                cause: cause.to_string(),
            }),
            Err(_) => Err(AgentError::TimedOut { call, limit }),
        }
    }
}

/// Streams by their tokens; 0 where there is none.
pub(crate) fn streams(tokens: [Option<u64>; 3]) -> protobuf::MessageField<Streams> {
    let [stdin, stdout, stderr] = tokens.map(Option::unwrap_or_default);
    protobuf::MessageField::some(Streams {
        stdin_token: stdin,
        stdout_token: stdout,
        stderr_token: stderr,
        ..Default::default()
    })
}
