//! Names that end up in paths: checked once, here, and carried as types from then on.

use std::fmt;
use std::path::Path;

/// Longest id in bytes, the limit that containerd sets too.
pub const MAX_ID_LENGTH: usize = 76;

/// An id that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} {id:?}: {reason}")]
pub struct IdError {
    what: &'static str,
    id: String,
    reason: &'static str,
}

/// The rule: 1 to 76 of `A-Z a-z 0-9 . _ -`, the first a letter or digit. So an id is one path
/// component, never hidden, never `..`, never an option.
fn check(what: &'static str, id: &str) -> Result<(), IdError> {
    let reason = if id.is_empty() {
        "it is empty"
    } else if id.len() > MAX_ID_LENGTH {
        "it is longer than 76 characters"
    } else if !id.as_bytes()[0].is_ascii_alphanumeric() {
        "it must begin with a letter or a digit"
    } else if !id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    {
        "only letters, digits, '.', '_' and '-' are allowed"
    } else {
        return Ok(());
    };
    // A hostile caller's id must not flood logs.
    let id = id.chars().take(100).collect();
    Err(IdError { what, id, reason })
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<&str> for $name {
            type Error = IdError;
            fn try_from(id: &str) -> Result<Self, IdError> {
                check($what, id)?;
                Ok(Self(id.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<Path> for $name {
            fn as_ref(&self) -> &Path {
                Path::new(&self.0)
            }
        }
    };
}

id_type!(
    /// A container, unique in its containerd namespace.
    ContainerId,
    "container id"
);
id_type!(
    /// A further process of a container, unique in that container.
    ExecId,
    "exec id"
);
id_type!(
    /// A sandbox: the pod's id, or the lone container's.
    SandboxId,
    "sandbox id"
);
id_type!(
    /// A containerd namespace.
    Namespace,
    "namespace"
);

/// Names one process: a container's init, or one of its execs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The container.
    pub container: ContainerId,
    /// None for the container's init.
    pub exec: Option<ExecId>,
}

impl ProcessId {
    /// From a request's two fields; an empty exec id means the init.
    ///
    /// # Errors
    /// When one of them breaks the rules for ids.
    pub fn new(container: &str, exec: &str) -> Result<Self, IdError> {
        let container = ContainerId::try_from(container)?;
        let exec = if exec.is_empty() {
            None
        } else {
            Some(ExecId::try_from(exec)?)
        };
        Ok(Self { container, exec })
    }

    /// The init of `container`.
    pub fn init(container: ContainerId) -> Self {
        Self {
            container,
            exec: None,
        }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accepts_what_containerd_hands_out() {
        let hex = "a".repeat(64);
        for id in ["x", "busybox-1", "k8s.io", "Web_2.1", &hex, &"z".repeat(76)] {
            assert!(ContainerId::try_from(id).is_ok(), "{id}");
        }
    }

    #[test]
    fn names_what_is_wrong() {
        let long = "a".repeat(77);
        for (id, reason) in [
            ("", "empty"),
            (".hidden", "begin"),
            ("-rf", "begin"),
            ("a/b", "only letters"),
            ("a b", "only letters"),
            ("é", "begin"),
            (long.as_str(), "76"),
        ] {
            let error = ContainerId::try_from(id).unwrap_err().to_string();
            assert!(
                error.contains(reason) && error.contains("container id"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn an_accepted_id_is_one_visible_path_component(id in "\\PC{0,90}") {
            if let Ok(id) = SandboxId::try_from(id.as_str()) {
                let path = Path::new("/run").join(&id);
                prop_assert_eq!(path.components().count(), 3);
                prop_assert!(!id.as_str().starts_with(['.', '-']));
            }
        }
    }
}
