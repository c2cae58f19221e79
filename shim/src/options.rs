//! The options that requests carry: where the configuration is, and what a pod is to be like.

use bulkhead_proto::cri::PodSandboxConfig;
use bulkhead_sandbox::config::ConfigSource;
use bulkhead_sandbox::pod::{Dns, PodLimits, PodSandbox};
use containerd_shim_protos::protobuf::CodedInputStream;
use containerd_shim_protos::protobuf::rt::WireType;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use std::io;
use std::path::Path;

/// `runtimeoptions.v1.Options` with or without a prefix: older daemons have one.
const TYPE: &str = "runtimeoptions.v1.Options";

/// A pod's configuration as containerd's CRI plugin hands it over, with or without a prefix.
const POD_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// File in a bundle, an `Any`: the runtime options of a sandbox, which come with the command
/// `start` and not with the request that needs them.
const LEFT: &str = "runtime-options";

/// Options that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// They aren't what they say.
    #[error("the options of type {type_url:?} cannot be decoded: {cause}")]
    Decode {
        /// What they say they are.
        type_url: String,
        /// Why they aren't.
        cause: protobuf::Error,
    },
    /// Those that `start` left can't be read.
    #[error("cannot read the runtime options {path}: {cause}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        cause: io::Error,
    },
}

fn decode_error(type_url: &str) -> impl FnOnce(protobuf::Error) -> OptionsError {
    move |cause| OptionsError::Decode {
        type_url: type_url.to_owned(),
        cause,
    }
}

/// Whether these options are for this shim.
pub fn are_ours(options: &Any) -> bool {
    options.type_url.ends_with(TYPE)
}

/// Leaves runtime options in a bundle for the request that will need them.
///
/// # Errors
/// When the file can't be written.
pub fn leave_in(bundle: &Path, options: &Any) -> io::Result<()> {
    std::fs::write(bundle.join(LEFT), options.write_to_bytes()?)
}

/// The runtime options that were left in a bundle.
///
/// # Errors
/// When there are some and they can't be read.
pub fn left_in(bundle: &Path) -> Result<Option<Any>, OptionsError> {
    let path = bundle.join(LEFT);
    match std::fs::read(&path) {
        Ok(bytes) => Any::parse_from_bytes(&bytes)
            .map(Some)
            .map_err(decode_error(LEFT)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(OptionsError::Read {
            path: path.display().to_string(),
            cause,
        }),
    }
}

/// Reads a pod's configuration from a sandbox's options, its network namespace left out. Options
/// of another type say nothing.
///
/// # Errors
/// When options of the right type can't be decoded.
pub fn pod_sandbox(options: Option<&Any>) -> Result<PodSandbox, OptionsError> {
    let Some(options) = options.filter(|options| options.type_url.ends_with(POD_TYPE)) else {
        return Ok(PodSandbox::default());
    };
    let config = PodSandboxConfig::parse_from_bytes(&options.value);
    let config = config.map_err(decode_error(&options.type_url))?;
    let linux = config.linux.into_option().unwrap_or_default();
    let resources = linux.resources.into_option().unwrap_or_default();
    let dns = config.dns_config.into_option().unwrap_or_default();
    let given = |number: i64| Some(number).filter(|number| *number != 0);
    Ok(PodSandbox {
        hostname: Some(config.hostname).filter(|name| !name.is_empty()),
        sysctls: linux.sysctls,
        limits: PodLimits {
            cpu_quota: given(resources.cpu_quota),
            cpu_period: given(resources.cpu_period).and_then(|period| period.try_into().ok()),
            memory: given(resources.memory_limit_in_bytes),
        },
        netns: None,
        cgroup_parent: Some(linux.cgroup_parent).filter(|parent| !parent.is_empty()),
        dns: Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        },
        annotations: config.annotations,
    })
}

/// Reads the place of the configuration from a request's options. Options of another type, runc's
/// for example, which some daemons always send, say nothing.
///
/// # Errors
/// When options of the right type can't be decoded.
pub fn config_source(options: Option<&Any>) -> Result<ConfigSource, OptionsError> {
    let Some(options) = options.filter(|options| are_ours(options)) else {
        return Ok(ConfigSource::default());
    };
    decode(&options.value).map_err(decode_error(&options.type_url))
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

    #[test]
    fn a_pods_configuration_is_read() {
        // hostname = 2, linux = 8 { cgroup_parent = 1, sysctls = 3, resources = 5 { cpu_period, cpu_quota, memory = 4 } }
        let sysctl = [field(1, "kernel.shmmax"), field(2, "7")].concat();
        let resources = [0x08, 0x64, 0x10, 0xc8, 0x01, 0x20, 0x80, 0x01];
        let sub = |number: u8, bytes: &[u8]| {
            let mut all = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
            all.extend(bytes);
            all
        };
        let linux = [field(1, "/pods/p1"), sub(3, &sysctl), sub(5, &resources)].concat();
        let dns = field(1, "192.0.2.1");
        let annotation = [field(1, "io.bulkhead.x"), field(2, "1")].concat();
        let bytes = [
            field(2, "web-0"),
            sub(4, &dns),
            sub(7, &annotation),
            sub(8, &linux),
        ]
        .concat();
        let pod = pod_sandbox(Some(&any(POD_TYPE, &bytes))).unwrap();
        assert_eq!(pod.hostname.as_deref(), Some("web-0"));
        assert_eq!(pod.sysctls["kernel.shmmax"], "7");
        assert_eq!(pod.dns.servers, ["192.0.2.1"]);
        assert_eq!(pod.annotations["io.bulkhead.x"], "1");
        assert_eq!(pod.cgroup_parent.as_deref(), Some("/pods/p1"));
        let limits = pod.limits;
        assert_eq!(
            (limits.cpu_period, limits.cpu_quota, limits.memory),
            (Some(100), Some(200), Some(128))
        );
        assert_eq!(pod_sandbox(None).unwrap(), PodSandbox::default());
        let other = any("google.protobuf.Empty", b"");
        assert_eq!(pod_sandbox(Some(&other)).unwrap(), PodSandbox::default());
        assert!(pod_sandbox(Some(&any(POD_TYPE, b"\x12\x50x"))).is_err());
    }

    #[test]
    fn options_left_in_a_bundle_are_found_there() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(left_in(bundle.path()).unwrap().is_none());
        let options = any(TYPE, &field(2, "/etc/b.toml"));
        leave_in(bundle.path(), &options).unwrap();
        assert_eq!(left_in(bundle.path()).unwrap(), Some(options));
        std::fs::write(bundle.path().join(LEFT), b"\x0a\x50x").unwrap();
        assert!(left_in(bundle.path()).is_err());
    }

    proptest! {
        #[test]
        fn any_pod_is_decoded_or_refused(bytes in proptest::collection::vec(0u8..=255, 0..100)) {
            let _ = pod_sandbox(Some(&any(POD_TYPE, &bytes)));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(0u8..=255, 0..100)) {
            let _ = decode(&bytes);
        }
    }
}
