//! How a call to the agent can fail.

use crate::Kind;
use crate::vmm::VmEnd;
use std::time::Duration;

/// A call to the agent that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// The agent refused.
    #[error("{message}")]
    Refused {
        /// What kind of refusal.
        kind: Kind,
        /// The agent's message.
        message: String,
    },
    /// No answer in time.
    #[error("the agent in the guest did not answer `{call}` within {limit:?}")]
    TimedOut {
        /// The call.
        call: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The VM ended during the call.
    #[error("the virtual machine ended during `{call}`: {end}")]
    VmEnded {
        /// The call.
        call: &'static str,
        /// Why it ended.
        end: VmEnd,
    },
    /// The connection broke, or the answer made no sense.
    #[error("the call `{call}` to the agent in the guest failed: {cause}")]
    Broken {
        /// The call.
        call: &'static str,
        /// What happened.
        cause: String,
    },
}

impl AgentError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            AgentError::Refused { kind, .. } => *kind,
            AgentError::TimedOut { .. } => Kind::DeadlineExceeded,
            AgentError::VmEnded { .. } | AgentError::Broken { .. } => Kind::Unknown,
        }
    }
}

pub(crate) type AgentResult<T> = Result<T, AgentError>;

/// What a code of the agent's answer means.
pub(super) fn kind_of(code: ttrpc::Code) -> Kind {
    match code {
        ttrpc::Code::NOT_FOUND => Kind::NotFound,
        ttrpc::Code::ALREADY_EXISTS => Kind::AlreadyExists,
        ttrpc::Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
        ttrpc::Code::INVALID_ARGUMENT => Kind::InvalidArgument,
        ttrpc::Code::UNIMPLEMENTED => Kind::Unimplemented,
        ttrpc::Code::UNAVAILABLE => Kind::Unavailable,
        _ => Kind::Unknown,
    }
}
