//! What the daemon writes to `start`'s standard input, and what it reads back.
//!
//! Up to containerd 2.2 the input is an `Any` of runtime options, or nothing; from 2.3 on it is
//! `BootstrapParams`. Each decodes as the other, so it counts as the latter only if it repeats the
//! command line's id and namespace.

use crate::flags::Flags;
use crate::options;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use std::path::PathBuf;

/// Version of the Task API that a daemon which sends parameters is told to use.
const TASK_API: i32 = containerd_shim_protos::TASK_API_VERSION;

/// Reads parameters from `input`; none from an older daemon.
pub fn params(input: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    let same = params.instance_id == flags.id && params.namespace == flags.namespace;
    (same && !flags.id.is_empty()).then_some(params)
}

/// The runtime options in `input`, which is `params` or an older daemon's bare options.
pub fn runtime_options(input: &[u8], params: Option<&BootstrapParams>) -> Option<Any> {
    let found = match params {
        Some(params) => params
            .extensions
            .iter()
            .filter_map(|extension| extension.value.as_ref())
            .find(|value| options::are_ours(value))
            .cloned(),
        None => Any::parse_from_bytes(input).ok(),
    };
    found.filter(options::are_ours)
}

/// Where the daemon wants the socket, if it says so.
pub fn socket_dir(params: Option<&BootstrapParams>) -> Option<PathBuf> {
    let dir = params?
        .socket_dir
        .as_deref()
        .filter(|dir| !dir.is_empty())?;
    Some(PathBuf::from(dir))
}

/// What to print for a shim at `address`: what every daemon understands, unless this one has shown
/// that it knows better.
pub fn answer(address: &str, params: Option<&BootstrapParams>) -> Vec<u8> {
    if params.is_none() {
        return address.as_bytes().to_vec();
    }
    let result = BootstrapResult {
        version: TASK_API,
        address: address.into(),
        protocol: "ttrpc".into(),
        ..Default::default()
    };
    // Strings and numbers can't fail to encode.
    result
        .write_to_bytes()
        .unwrap_or_else(|_| address.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::Extension;
    use proptest::prelude::*;

    fn flags() -> Flags {
        Flags {
            id: "c1".into(),
            namespace: "default".into(),
            ..Flags::default()
        }
    }

    fn real() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            socket_dir: Some("/run/x".into()),
            ..Default::default()
        }
    }

    #[test]
    fn parameters_are_taken_and_answered_in_kind() {
        let params = params(&real().write_to_bytes().unwrap(), &flags()).unwrap();
        assert_eq!(socket_dir(Some(&params)), Some("/run/x".into()));
        let answer = answer("unix:///s", Some(&params));
        let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s"));
    }

    #[test]
    fn anything_else_gets_the_plain_address() {
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: b"default".to_vec(),
            ..Default::default()
        };
        for input in [
            options.write_to_bytes().unwrap(),
            Vec::new(),
            b"junk".to_vec(),
        ] {
            assert!(params(&input, &flags()).is_none());
        }
        let other = Flags {
            id: "c2".into(),
            ..flags()
        };
        assert!(params(&real().write_to_bytes().unwrap(), &other).is_none());
        assert_eq!(answer("unix:///s", None), b"unix:///s");
        assert!(params(&[], &Flags::default()).is_none());
    }

    #[test]
    fn options_are_found_bare_and_among_parameters() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x12\x01x".to_vec(),
            ..Default::default()
        };
        let bare = options.write_to_bytes().unwrap();
        assert_eq!(runtime_options(&bare, None), Some(options.clone()));
        let mut params = real();
        for value in [Any::default(), options.clone()] {
            params.extensions.push(Extension {
                value: Some(value).into(),
                ..Default::default()
            });
        }
        assert_eq!(runtime_options(b"", Some(&params)), Some(options));
        assert_eq!(runtime_options(b"", Some(&real())), None);
        assert_eq!(runtime_options(b"junk", None), None);
    }

    proptest! {
        #[test]
        fn no_options_are_mistaken_for_parameters(url in "[a-z./A-Z]{3,40}", value in proptest::collection::vec(0u8..=255, 0..60)) {
            let any = Any { type_url: url, value, ..Default::default() };
            prop_assert!(params(&any.write_to_bytes().unwrap(), &flags()).is_none());
        }
    }
}
