//! What a daemon names as a standard stream: a bare path or a URI.

use super::StdioError;
use std::path::PathBuf;

/// One stream's target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nothing: /dev/null.
    Null,
    /// A FIFO, or a file or device that exists.
    Path(PathBuf),
    /// A file to append to, made if need be.
    File(PathBuf),
    /// A program that takes the output.
    Log(LogProgram),
}

/// A program that takes a container's output, with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogProgram {
    pub program: PathBuf,
    pub args: Vec<String>,
}

impl Target {
    /// Parses `uri`; `stream` names it in errors.
    pub fn parse(stream: &'static str, uri: &str) -> Result<Self, StdioError> {
        let bad = |problem| StdioError::Uri {
            stream,
            uri: uri.chars().take(256).collect(),
            problem,
        };
        if uri.is_empty() {
            return Ok(Target::Null);
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            let path = PathBuf::from(uri);
            return if path.is_absolute() {
                Ok(Target::Path(path))
            } else {
                Err(bad("it must be an absolute path"))
            };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path).ok_or_else(|| bad("its %-escapes are wrong"))?);
        if !path.is_absolute() {
            return Err(bad("its path must be absolute, with three slashes"));
        }
        match scheme {
            "fifo" => Ok(Target::Path(path)),
            "file" => Ok(Target::File(path)),
            "binary" => {
                let args = arguments(query).ok_or_else(|| bad("its %-escapes are wrong"))?;
                Ok(Target::Log(LogProgram {
                    program: path,
                    args,
                }))
            }
            _ => Err(bad("its scheme must be fifo, file or binary")),
        }
    }
}

/// The query's keys and non-empty values, in the order given, each an argument of its own.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decode(&key.replace('+', " "))?);
        if !value.is_empty() {
            args.push(decode(&value.replace('+', " "))?);
        }
    }
    Some(args)
}

/// Undoes %-escapes (RFC 3986 §2.1); none if they are broken or give no UTF-8 or a zero byte.
fn decode(text: &str) -> Option<String> {
    let mut plain = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' {
            let digit = |byte: u8| char::from(byte).to_digit(16);
            let (high, low) = (digit(bytes.next()?)?, digit(bytes.next()?)?);
            u8::try_from(high * 16 + low).ok()?
        } else {
            byte
        };
        if byte == 0 {
            return None;
        }
        plain.push(byte);
    }
    String::from_utf8(plain).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(uri: &str) -> Result<Target, String> {
        Target::parse("stdout", uri).map_err(|error| error.to_string())
    }

    #[test]
    fn each_scheme() {
        assert_eq!(parse(""), Ok(Target::Null));
        assert_eq!(parse("/run/f"), Ok(Target::Path("/run/f".into())));
        assert_eq!(parse("fifo:///run/f"), Ok(Target::Path("/run/f".into())));
        assert_eq!(
            parse("file:///var/log/a%20b"),
            Ok(Target::File("/var/log/a b".into()))
        );
        let log = LogProgram {
            program: "/usr/bin/nerdctl".into(),
            args: vec![
                "_NERDCTL_INTERNAL_LOGGING".into(),
                "/var/lib/x y".into(),
                "-v".into(),
            ],
        };
        let uri = "binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fx+y&-v";
        assert_eq!(parse(uri), Ok(Target::Log(log)));
    }

    #[test]
    fn nonsense_is_named() {
        for (uri, wanted) in [
            ("relative/f", "absolute path"),
            ("file://etc/x", "three slashes"),
            ("http:///x", "scheme"),
            ("file:///a%zz", "%-escapes"),
            ("file:///a%00", "%-escapes"),
        ] {
            let error = parse(uri).unwrap_err();
            assert!(
                error.contains(wanted) && error.contains("stdout"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_target_or_an_error(uri in "\\PC{0,60}") {
            let _ = parse(&uri);
        }

        #[test]
        fn escapes_are_undone(text in "\\PC{1,30}") {
            let escaped: String = text.bytes().map(|byte| format!("%{byte:02X}")).collect();
            prop_assert_eq!(decode(&escaped), Some(text));
        }
    }
}
