//! Connections to the guest's vsock ports, by the VMM's socket.

use super::error::{AgentError, AgentResult};
use crate::folder::short_path;
use crate::pace::Pace;
use crate::vmm::Vmm;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Longest answer to CONNECT: "OK ", a port, a newline.
const MAX_ANSWER: usize = 32;

/// How long the VMM's end may come after the connection's.
pub(super) const END_AFTER_BREAK: Duration = Duration::from_secs(3);

/// The Unix socket that stands for the guest's vsock ports.
pub(super) struct VsockSocket {
    pub folder: File,
}

/// Connects to a port of the guest, if it doesn't end before.
pub(super) async fn dial(
    vsock: &VsockSocket,
    port: u32,
    call: &'static str,
    vmm: &Arc<Vmm>,
    pace: Pace,
) -> AgentResult<UnixStream> {
    let limit = pace.dial();
    let dialled = async {
        let mut socket = UnixStream::connect(short_path(&vsock.folder, "vsock.sock")).await?;
        handshake(&mut socket, port).await?;
        Ok(socket)
    };
    let ended = |end| AgentError::VmEnded { call, end };
    let error: io::Error = tokio::select! {
        biased;
        end = vmm.wait() => return Err(ended(end)),
        dialled = timeout(limit, dialled) => match dialled {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => error,
            Err(_) => return Err(AgentError::TimedOut { call, limit }),
        },
    };
    // A guest that has just ended refuses too; its end is the better explanation.
    match timeout(END_AFTER_BREAK, vmm.wait()).await {
        Ok(end) => Err(ended(end)),
        Err(_) => Err(AgentError::Broken {
            call,
            cause: format!("vsock port {port}: {error}"),
        }),
    }
}

/// The VMM's line protocol: `CONNECT <port>`, answered by `OK <port>`. Reads not one byte more,
/// for what follows is the guest's.
async fn handshake(
    socket: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    port: u32,
) -> io::Result<()> {
    socket
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    loop {
        match socket.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if answer.len() < MAX_ANSWER => answer.push(byte),
            Ok(_) => return Err(io::Error::other("the VMM's answer to CONNECT has no end")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the guest refused the connection",
                ));
            }
            Err(error) => return Err(error),
        }
    }
    let accepted = answer
        .strip_prefix(b"OK ")
        .and_then(|port| std::str::from_utf8(port).ok())
        .is_some_and(|port| port.parse::<u32>().is_ok());
    if accepted {
        return Ok(());
    }
    let answer = String::from_utf8_lossy(&answer).escape_debug().to_string();
    Err(io::Error::other(format!(
        "the VMM answered CONNECT by {answer:?}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    async fn talk(answer: &[u8]) -> (io::Result<()>, Vec<u8>, Vec<u8>) {
        let (mut near, mut far) = tokio::io::duplex(4096);
        far.write_all(answer).await.unwrap();
        far.shutdown().await.unwrap();
        let result = handshake(&mut near, 1024).await;
        let mut rest = Vec::new();
        near.read_to_end(&mut rest).await.unwrap();
        drop(near);
        let mut asked = Vec::new();
        far.read_to_end(&mut asked).await.unwrap();
        (result, rest, asked)
    }

    #[tokio::test]
    async fn the_guests_first_bytes_are_left_alone() {
        let (result, rest, asked) = talk(b"OK 1073741824\nhello").await;
        result.unwrap();
        assert_eq!(rest, b"hello");
        assert_eq!(asked, b"CONNECT 1024\n");
    }

    #[tokio::test]
    async fn a_refusal_is_told_from_nonsense() {
        let (result, ..) = talk(b"").await;
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        for nonsense in [&b"NO\n"[..], b"OK x\n", b"OK \n", &[b'x'; 100]] {
            let (result, ..) = talk(nonsense).await;
            assert!(result.is_err(), "{nonsense:?}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_ends_in_a_verdict(answer in proptest::collection::vec(any::<u8>(), 0..80)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (result, ..) = runtime.block_on(talk(&answer));
            if result.is_ok() {
                prop_assert!(answer.starts_with(b"OK "));
            }
        }
    }
}
