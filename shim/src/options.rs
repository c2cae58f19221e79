//! The runtime options of a create request: where the configuration is.

use bulkhead_sandbox::config::ConfigSource;
use containerd_shim_protos::protobuf::CodedInputStream;
use containerd_shim_protos::protobuf::rt::WireType;
use protobuf::well_known_types::any::Any;

/// `runtimeoptions.v1.Options` with or without a prefix: older daemons have one.
const TYPE: &str = "runtimeoptions.v1.Options";

/// Options that are none.
#[derive(Debug, thiserror::Error)]
#[error("the runtime options of type {type_url:?} cannot be decoded: {cause}")]
pub struct OptionsError {
    type_url: String,
    cause: protobuf::Error,
}

/// Reads the place of the configuration from a request's options. Options of another type, runc's
/// for example, which some daemons always send, say nothing.
///
/// # Errors
/// When options of the right type can't be decoded.
pub fn config_source(options: Option<&Any>) -> Result<ConfigSource, OptionsError> {
    let Some(options) = options.filter(|options| options.type_url.ends_with(TYPE)) else {
        return Ok(ConfigSource::default());
    };
    decode(&options.value).map_err(|cause| OptionsError {
        type_url: options.type_url.clone(),
        cause,
    })
}

/// `message Options { string type_url = 1; string config_path = 2; bytes config_body = 3; }`
fn decode(bytes: &[u8]) -> Result<ConfigSource, protobuf::Error> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut source = ConfigSource::default();
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // A tag is the field's number and the wire type in the lowest three bits.
        match (tag >> 3, tag & 7) {
            (2, 2) => {
                source.path = Some(input.read_string()?)
                    .filter(|path| !path.is_empty())
                    .map(Into::into)
            }
            (3, 2) => {
                source.body = Some(input.read_string()?).filter(|body| !body.trim().is_empty())
            }
            (_, wire) => {
                let wire = WireType::new(wire).ok_or_else(|| {
                    protobuf::Error::from(std::io::Error::from(std::io::ErrorKind::InvalidData))
                })?;
                input.skip_field(wire)?;
            }
        }
    }
    Ok(source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Default::default()
        }
    }

    fn field(number: u8, text: &str) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2, u8::try_from(text.len()).unwrap()];
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn path_and_body_are_found_under_both_names() {
        let bytes = [
            field(1, "t"),
            field(2, "/etc/b.toml"),
            field(3, "vcpus = 2"),
            field(9, "?"),
        ]
        .concat();
        for name in ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"] {
            let source = config_source(Some(&any(name, &bytes))).unwrap();
            assert_eq!(source.path, Some("/etc/b.toml".into()));
            assert_eq!(source.body.as_deref(), Some("vcpus = 2"));
        }
    }

    #[test]
    fn other_options_say_nothing() {
        let source = config_source(Some(&any("containerd.runc.v1.Options", b"\xff\xff"))).unwrap();
        assert_eq!(source, ConfigSource::default());
        assert_eq!(config_source(None).unwrap(), ConfigSource::default());
        let empty = any(TYPE, &[field(2, ""), field(3, " ")].concat());
        assert_eq!(
            config_source(Some(&empty)).unwrap(),
            ConfigSource::default()
        );
        assert!(config_source(Some(&any(TYPE, b"\x12\x50x"))).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(0u8..=255, 0..100)) {
            let _ = decode(&bytes);
        }
    }
}
