//! Connections between their arrival and the request that names their token.

use super::{HostStreams, Tokens};
use crate::error::{Failure, Kind};
use crate::log;
use crate::transport::{Endpoint, Listener};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Connections that may wait for their request, or for their token, at once.
const MAX_PENDING: usize = 256;

/// How long a connection may take to say its token, and how long it may then wait for the request
/// that names it. Long, because a guest whose kernel is emulated takes seconds for what otherwise
/// takes milliseconds.
const UNCLAIMED: Duration = Duration::from_secs(120);

/// How long a request waits for a connection that the host has promised.
const PROMISED: Duration = Duration::from_secs(60);

/// Pause after an accept that failed, so that a lasting failure doesn't become a busy loop.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// Why a process didn't get its streams.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Two streams of one request have the same token, or a token is already being waited for.
    #[error("stream token {0:#x} is used twice; every stream needs a token of its own")]
    Twice(u64),
    /// The connection didn't come.
    #[error(
        "no stream connection with token {token:#x} arrived within {} s; dial the stream port and send the token before the request",
        PROMISED.as_secs()
    )]
    Missing {
        /// The token that the request named.
        token: u64,
    },
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        let kind = match error {
            StreamError::Twice(_) => Kind::InvalidArgument,
            StreamError::Missing { .. } => Kind::FailedPrecondition,
        };
        Self::new(kind, error.to_string())
    }
}

enum Slot {
    Arrived(Endpoint, Instant),
    Awaited(oneshot::Sender<Endpoint>),
}

/// Owner of all connections that no process has claimed yet.
#[derive(Clone, Default)]
pub struct PendingStreams {
    slots: Arc<Mutex<BTreeMap<u64, Slot>>>,
}

impl PendingStreams {
    /// Accepts connections for ever.
    pub async fn accept(self, listener: Listener) {
        let unnamed = Arc::new(tokio::sync::Semaphore::new(MAX_PENDING));
        loop {
            // Past the bound, further connections wait in the kernel's backlog.
            let Ok(permit) = Arc::clone(&unnamed).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok(endpoint) => {
                    let pending = self.clone();
                    tokio::spawn(async move {
                        let token = tokio::time::timeout(UNCLAIMED, read_token(&endpoint)).await;
                        if let Ok(Ok(token)) = token {
                            pending.arrived(token, endpoint);
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    log::error(format_args!("accept a stream connection: {error}"));
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn arrived(&self, token: u64, endpoint: Endpoint) {
        let now = Instant::now();
        let mut slots = self.lock();
        match slots.remove(&token) {
            Some(Slot::Awaited(waiter)) => {
                // The waiter may just have given up; then the connection is closed.
                let _ = waiter.send(endpoint);
            }
            // The later one is the intruder or the mistake: tokens are unique.
            Some(earlier) => {
                slots.insert(token, earlier);
            }
            None => {
                slots.retain(|_, slot| match slot {
                    Slot::Arrived(_, since) => now.duration_since(*since) < UNCLAIMED,
                    Slot::Awaited(waiter) => !waiter.is_closed(),
                });
                if slots.len() < MAX_PENDING {
                    slots.insert(token, Slot::Arrived(endpoint, now));
                }
            }
        }
    }

    /// Hands over the connections of these tokens, waiting for those that haven't come yet.
    pub async fn claim(&self, tokens: Tokens) -> Result<HostStreams, StreamError> {
        let all: Vec<u64> = tokens.iter().collect();
        if let Some(twice) = all
            .iter()
            .enumerate()
            .find_map(|(index, token)| all.get(..index)?.contains(token).then_some(*token))
        {
            return Err(StreamError::Twice(twice));
        }
        let deadline = Instant::now() + PROMISED;
        Ok(HostStreams {
            stdin: self.claim_one(tokens.stdin, deadline).await?,
            stdout: self.claim_one(tokens.stdout, deadline).await?,
            stderr: self.claim_one(tokens.stderr, deadline).await?,
        })
    }

    async fn claim_one(
        &self,
        token: Option<u64>,
        deadline: Instant,
    ) -> Result<Option<Endpoint>, StreamError> {
        let Some(token) = token else {
            return Ok(None);
        };
        let arrival = {
            let mut slots = self.lock();
            match slots.remove(&token) {
                Some(Slot::Arrived(endpoint, _)) => return Ok(Some(endpoint)),
                Some(Slot::Awaited(waiter)) if !waiter.is_closed() => {
                    slots.insert(token, Slot::Awaited(waiter));
                    return Err(StreamError::Twice(token));
                }
                Some(Slot::Awaited(_)) | None => {
                    let (sender, receiver) = oneshot::channel();
                    slots.insert(token, Slot::Awaited(sender));
                    receiver
                }
            }
        };
        match tokio::time::timeout_at(deadline, arrival).await {
            Ok(Ok(endpoint)) => Ok(Some(endpoint)),
            _ => {
                self.discard([token]);
                Err(StreamError::Missing { token })
            }
        }
    }

    /// Closes the connections of a request that has failed.
    pub fn discard(&self, tokens: impl IntoIterator<Item = u64>) {
        let mut slots = self.lock();
        for token in tokens {
            slots.remove(&token);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Slot>> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The first 8 bytes, little-endian; nothing beyond them is read.
async fn read_token(endpoint: &Endpoint) -> io::Result<u64> {
    let mut bytes = [0; 8];
    endpoint.read_exact(&mut bytes).await?;
    match u64::from_le_bytes(bytes) {
        0 => Err(io::ErrorKind::InvalidData.into()),
        token => Ok(token),
    }
}
