//! The shim's command line, which follows Go's flag package: one dash or two, `-name value` or
//! `-name=value`, switches without a value, and flags only before the first argument.

use std::path::PathBuf;

/// What a daemon asks of the shim's binary.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// The containerd namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// The daemon's gRPC address.
    pub address: String,
    /// The daemon's binary, for publishing events; unused, they go over ttrpc.
    pub publish_binary: String,
    /// The bundle; only given to `delete`.
    pub bundle: Option<PathBuf>,
    /// Verbose logs.
    pub debug: bool,
    /// Print the version and leave.
    pub version: bool,
    /// Print the runtime's description and leave.
    pub info: bool,
    /// `start`, `delete`, or this program's own `serve`.
    pub action: String,
}

/// A command line that can't be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// No such flag.
    #[error("unknown flag {0:?}")]
    Unknown(String),
    /// A flag's value is missing or wrong.
    #[error("flag -{0} needs {1}")]
    Value(String, &'static str),
}

impl Flags {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    /// On an unknown flag or a bad value.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, FlagError> {
        let mut flags = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = flag_text(&arg) else {
                flags.action = if arg == "--" {
                    args.next().unwrap_or_default()
                } else {
                    arg
                };
                break;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if let Some(switch) = flags.switch(name) {
                *switch = truth(name, value.as_deref())?;
                continue;
            }
            if !TEXT_FLAGS.contains(&name) {
                return Err(FlagError::Unknown(arg.clone()));
            }
            let value = value.or_else(|| args.next());
            let value = value.ok_or_else(|| FlagError::Value(name.into(), "a value"))?;
            flags.set_text(name, value);
        }
        flags.bundle = flags.bundle.filter(|bundle| !bundle.as_os_str().is_empty());
        Ok(flags)
    }

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "debug" => Some(&mut self.debug),
            "v" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        }
    }

    fn set_text(&mut self, name: &str, value: String) {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "publish-binary" => self.publish_binary = value,
            "bundle" => self.bundle = Some(value.into()),
            _ => {}
        }
    }
}

/// Flags with a value. `socket` is an older daemons' and means nothing: the place is ours.
const TEXT_FLAGS: [&str; 6] = [
    "namespace",
    "id",
    "address",
    "publish-binary",
    "bundle",
    "socket",
];

/// The flag's text without its dashes; none for an argument. A lone dash is an argument, and so is
/// what follows two dashes that stand alone.
fn flag_text(arg: &str) -> Option<&str> {
    let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    (!flag.is_empty()).then_some(flag)
}

fn truth(name: &str, value: Option<&str>) -> Result<bool, FlagError> {
    match value {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(_) => Err(FlagError::Value(name.into(), "true or false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &str) -> Result<Flags, FlagError> {
        Flags::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_containerd_sends() {
        let flags = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary \
             /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(
            (flags.namespace.as_str(), flags.id.as_str()),
            ("k8s.io", "c1")
        );
        assert_eq!(flags.action, "start");
        assert!(flags.debug && flags.bundle.is_none());
        let flags = parse("-namespace=x --id=c1 -bundle /b -debug=false delete").unwrap();
        assert_eq!(flags.bundle, Some("/b".into()));
        assert!(!flags.debug);
        assert_eq!(flags.action, "delete");
    }

    #[test]
    fn switches_and_errors() {
        assert!(parse("-v").unwrap().version);
        assert!(parse("--info").unwrap().info);
        assert_eq!(
            parse("start -id x").unwrap().id,
            "",
            "flags end at the first argument"
        );
        assert_eq!(parse("-- start").unwrap().action, "start");
        assert_eq!(parse("-wrong x"), Err(FlagError::Unknown("-wrong".into())));
        assert_eq!(parse("-id"), Err(FlagError::Value("id".into(), "a value")));
        assert_eq!(
            parse("-debug=maybe"),
            Err(FlagError::Value("debug".into(), "true or false"))
        );
    }

    proptest! {
        #[test]
        fn any_command_line_is_understood_or_refused(args in proptest::collection::vec("\\PC{0,12}", 0..8)) {
            let _ = Flags::parse(args);
        }

        #[test]
        fn a_value_is_taken_as_it_is(id in "\\PC{0,20}") {
            let spaced = Flags::parse(["-id".to_owned(), id.clone(), "start".to_owned()]).unwrap();
            let joined = Flags::parse([format!("-id={id}"), "start".to_owned()]).unwrap();
            prop_assert_eq!(&spaced, &joined);
            prop_assert_eq!(spaced.id, id);
        }
    }
}
