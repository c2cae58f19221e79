//! What went wrong, as the host is told: a kind that it can match on, and a sentence for people.
//!
//! Modules have their own error enums where someone matches on them; all of them end as a
//! [`Failure`], which also travels from the set-up process of a container to the agent (see
//! [`crate::process::report`]). `server.rs` alone turns kinds into ttrpc codes.

use std::fmt::Display;

/// What sort of failure it is; each is one ttrpc code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A container, process, rootfs or executable that isn't there.
    NotFound = 1,
    /// A request that can't be honoured, whatever the state.
    InvalidArgument = 2,
    /// The id is taken.
    AlreadyExists = 3,
    /// Not in this state.
    FailedPrecondition = 4,
    /// One of the agent's own bounds is reached.
    ResourceExhausted = 5,
    /// The guest refused something that should work.
    Internal = 6,
}

impl Kind {
    /// The kind with this number, if there is one.
    pub fn from_number(number: u8) -> Option<Self> {
        [
            Self::NotFound,
            Self::InvalidArgument,
            Self::AlreadyExists,
            Self::FailedPrecondition,
            Self::ResourceExhausted,
            Self::Internal,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == number)
    }
}

/// A request that failed, ready to be told to the host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What sort of failure it is.
    pub kind: Kind,
    /// What was tried, on what, and why it failed.
    pub message: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// [`Kind::Internal`]: `action` failed because of `cause`.
    pub fn internal(action: impl Display, cause: impl Display) -> Self {
        Self::new(Kind::Internal, format!("{action}: {cause}"))
    }

    /// [`Kind::InvalidArgument`]: `field` of the request can't be honoured, because of `reason`.
    pub fn invalid(field: impl Display, reason: impl Display) -> Self {
        Self::new(Kind::InvalidArgument, format!("{field}: {reason}"))
    }
}

/// Adds what was tried to an error of the kernel's.
pub trait Context<T> {
    /// Turns an error into [`Kind::Internal`] with `action` in front; `action` is only made on failure.
    fn context<D: Display>(self, action: impl FnOnce() -> D) -> Result<T, Failure>;
}

impl<T, E: Display> Context<T> for Result<T, E> {
    fn context<D: Display>(self, action: impl FnOnce() -> D) -> Result<T, Failure> {
        self.map_err(|cause| Failure::internal(action(), cause))
    }
}
