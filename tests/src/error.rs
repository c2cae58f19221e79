//! Failures of the harness itself, and of what it drives.

/// Result of the harness's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call of the harness failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or file operation.
    #[error("{what}: {cause}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// Something that should have happened by now.
    #[error("{what} did not happen within {seconds} s{detail}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long, in seconds.
        seconds: u64,
        /// What is known of the reason; begins with a separator or is empty.
        detail: String,
    },
    /// The other side said or did something else than its contract allows.
    #[error("{0}")]
    Unexpected(String),
    /// A call to a shim was answered with an error status.
    #[error("{method}: {}: {}", code_name(*.code), .message)]
    Rpc {
        /// The method.
        method: String,
        /// ttrpc status code.
        code: i32,
        /// The status's message.
        message: String,
    },
}

fn code_name(code: i32) -> String {
    use protobuf::Enum;
    ttrpc::Code::from_i32(code).map_or_else(|| format!("code {code}"), |code| format!("{code:?}"))
}

/// Adds to an I/O error what was tried.
pub trait Context<T> {
    /// Names what was tried, on what.
    ///
    /// # Errors
    /// The same failure, with its context.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::Io {
            what: what(),
            cause: cause.into(),
        })
    }
}
