//! Process streams: connections that the host opens and names by token, and the copying between
//! them and the pipes or terminals of processes.

mod copy;
mod pending;

pub use copy::{copy_input, copy_output, copy_until_end};
pub use pending::PendingStreams;

use crate::transport::Endpoint;
use bulkhead_proto::agent::Streams;

/// The tokens of one process; `None` is /dev/null.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tokens {
    /// Standard input.
    pub stdin: Option<u64>,
    /// Standard output, or all of a terminal's output.
    pub stdout: Option<u64>,
    /// Standard error.
    pub stderr: Option<u64>,
}

impl From<&Streams> for Tokens {
    fn from(streams: &Streams) -> Self {
        let token = |token: u64| (token != 0).then_some(token);
        Self {
            stdin: token(streams.stdin_token),
            stdout: token(streams.stdout_token),
            stderr: token(streams.stderr_token),
        }
    }
}

impl Tokens {
    /// The tokens that name a connection.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        [self.stdin, self.stdout, self.stderr].into_iter().flatten()
    }
}

/// The connections of one process.
#[derive(Debug, Default)]
pub struct HostStreams {
    /// Standard input.
    pub stdin: Option<Endpoint>,
    /// Standard output, or all of a terminal's output.
    pub stdout: Option<Endpoint>,
    /// Standard error.
    pub stderr: Option<Endpoint>,
}
