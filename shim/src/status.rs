//! From the sandbox library's errors to ttrpc's status codes: the one place where that happens.

use bulkhead_sandbox::config::ConfigError;
use bulkhead_sandbox::ids::IdError;
use bulkhead_sandbox::{Error, Kind};
use ttrpc::{Code, get_status};

use crate::options::OptionsError;

/// Anything that a request can fail with.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The sandbox refused or failed.
    #[error(transparent)]
    Sandbox(#[from] Error),
    /// The runtime options can't be decoded.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The method exists, but not here.
    #[error("{0}")]
    Unimplemented(&'static str),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
}

impl From<IdError> for RequestError {
    fn from(error: IdError) -> Self {
        Self::Sandbox(error.into())
    }
}

impl From<ConfigError> for RequestError {
    fn from(error: ConfigError) -> Self {
        Self::Sandbox(error.into())
    }
}

impl From<RequestError> for ttrpc::Error {
    fn from(error: RequestError) -> Self {
        let code = match &error {
            RequestError::Sandbox(error) => code(error.kind()),
            RequestError::Options(_) | RequestError::Invalid(_) => Code::INVALID_ARGUMENT,
            RequestError::Unimplemented(_) => Code::UNIMPLEMENTED,
        };
        ttrpc::Error::RpcStatus(get_status(code, error))
    }
}

fn code(kind: Kind) -> Code {
    match kind {
        Kind::NotFound => Code::NOT_FOUND,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
        Kind::InvalidArgument => Code::INVALID_ARGUMENT,
        Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        Kind::Unavailable => Code::UNAVAILABLE,
        Kind::Unimplemented => Code::UNIMPLEMENTED,
        Kind::Unknown => Code::UNKNOWN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_get_the_codes_that_they_act_on() {
        let status = |error: RequestError| match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
            other => panic!("{other:?}"),
        };
        let (code, message) = status(Error::AlreadyFinished.into());
        assert_eq!(
            (code, message.as_str()),
            (Code::NOT_FOUND, "process already finished")
        );
        let (code, message) = status(Error::NotFound("container c1".into()).into());
        assert_eq!(code, Code::NOT_FOUND);
        assert!(message.contains("c1"));
        assert_eq!(
            status(Error::AlreadyExists("x".into()).into()).0,
            Code::ALREADY_EXISTS
        );
        assert_eq!(
            status(RequestError::Unimplemented("x")).0,
            Code::UNIMPLEMENTED
        );
    }
}
