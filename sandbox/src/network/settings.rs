//! How fast a pod's interfaces may be, and what may pass them: by configuration, and within what
//! that allows by the pod's annotations.

use crate::pod::Annotations;
use crate::spec::SpecError;
use bulkhead_proto::vmm::RateLimit;
use serde::Deserialize;
use std::fs::File;
use std::io;

/// Annotations begin so; what follows is the name of a key of the configuration's.
const PREFIX: &str = "io.bulkhead.network.";

/// The device of hosts whose kernel can serve network cards.
const VHOST_NET: &str = "/dev/vhost-net";

/// What an administrator can set of each interface of a pod's. 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// What the guest gets, in bytes a second, link-layer headers included.
    pub to_guest_bytes_per_second: u64,
    /// What the guest gets, in frames a second.
    pub to_guest_frames_per_second: u64,
    /// What the guest sends, in bytes a second.
    pub from_guest_bytes_per_second: u64,
    /// What the guest sends, in frames a second.
    pub from_guest_frames_per_second: u64,
    /// What addresses the guest may send from.
    pub source_addresses: SourceAddresses,
    /// Whether the host's kernel moves the frames where it can: it has /dev/vhost-net, and the pod
    /// has no limits.
    pub vhost: bool,
}

/// Which senders the frames of a guest's may name, beside the link-layer address, which is always
/// the interface's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceAddresses {
    /// The interface's own.
    #[default]
    Own,
    /// The interface's own, unless the pod's annotation asks for any.
    Annotated,
    /// Any, unless the pod's annotation asks for its own only.
    Any,
}

/// What the interfaces of one pod are like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct NetworkSettings {
    /// Limits what the guest gets.
    pub to_guest: RateLimit,
    /// Limits what the guest sends.
    pub from_guest: RateLimit,
    /// Frames from addresses that the interface doesn't have are dropped.
    pub own_addresses_only: bool,
    /// See [`NetworkConfig::vhost`].
    pub vhost: bool,
}

impl NetworkSettings {
    /// Descriptors of vhost-net, one for each pair of queues; none if the VMM is to move the frames.
    pub fn vhosts(&self, pairs: usize) -> Vec<File> {
        // The kernel knows no limits. Senders are checked at the tap, whoever moves the frames.
        let limited = [self.to_guest, self.from_guest] != [RateLimit::default(); 2];
        if !self.vhost || limited {
            return Vec::new();
        }
        let open = || File::options().read(true).write(true).open(VHOST_NET);
        let opened: io::Result<Vec<File>> = (0..pairs).map(|_| open()).collect();
        opened.unwrap_or_else(|error| {
            tracing::debug!(%error, "{VHOST_NET} is not used");
            Vec::new()
        })
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            to_guest_bytes_per_second: 0,
            to_guest_frames_per_second: 0,
            from_guest_bytes_per_second: 0,
            from_guest_frames_per_second: 0,
            source_addresses: SourceAddresses::Own,
            vhost: true,
        }
    }
}

impl NetworkConfig {
    /// What holds for a pod with these annotations: a pod can't have more than the host allows it.
    ///
    /// # Errors
    /// When an annotation has no value that is possible, or isn't one that there is.
    pub(crate) fn of_pod(
        mut self,
        annotations: &Annotations,
    ) -> Result<NetworkSettings, SpecError> {
        let mut own_addresses_only = self.source_addresses != SourceAddresses::Any;
        for (annotation, value) in annotations {
            let Some(key) = annotation.strip_prefix(PREFIX) else {
                continue;
            };
            let wrong = |problem: String| SpecError::Field {
                field: format!("annotations[{annotation:?}]"),
                problem,
            };
            let limit = match key {
                "to_guest_bytes_per_second" => &mut self.to_guest_bytes_per_second,
                "to_guest_frames_per_second" => &mut self.to_guest_frames_per_second,
                "from_guest_bytes_per_second" => &mut self.from_guest_bytes_per_second,
                "from_guest_frames_per_second" => &mut self.from_guest_frames_per_second,
                "source_addresses" => {
                    own_addresses_only = self.own_only(value).map_err(wrong)?;
                    continue;
                }
                _ => return Err(wrong("there is no such setting of the network".into())),
            };
            let asked = value.parse::<u64>();
            let asked = asked.map_err(|_| wrong(format!("{value:?} is not a whole number")))?;
            *limit = match (*limit, asked) {
                (limit, 0) => limit,
                (0, asked) => asked,
                (limit, asked) => limit.min(asked),
            };
        }
        Ok(NetworkSettings {
            to_guest: RateLimit {
                bytes_per_second: self.to_guest_bytes_per_second,
                frames_per_second: self.to_guest_frames_per_second,
            },
            from_guest: RateLimit {
                bytes_per_second: self.from_guest_bytes_per_second,
                frames_per_second: self.from_guest_frames_per_second,
            },
            own_addresses_only,
            vhost: self.vhost,
        })
    }

    fn own_only(self, asked: &str) -> Result<bool, String> {
        match (asked, self.source_addresses) {
            ("own", _) => Ok(true),
            ("any", SourceAddresses::Own) => Err(
                "\"any\" is not allowed to pods here; the host's configuration must say \
                 source_addresses = \"annotated\" under [network]"
                    .into(),
            ),
            ("any", _) => Ok(false),
            _ => Err(format!("{asked:?} is neither \"own\" nor \"any\"")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_pod(
        source_addresses: SourceAddresses,
        annotations: &[(&str, &str)],
    ) -> Result<NetworkSettings, SpecError> {
        let config = NetworkConfig {
            to_guest_bytes_per_second: 1000,
            source_addresses,
            ..Default::default()
        };
        let annotations = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        config.of_pod(&annotations.collect())
    }

    #[test]
    fn annotations_lower_limits_and_never_raise_them() {
        let name = "io.bulkhead.network.to_guest_bytes_per_second";
        for (asked, wanted) in [("500", 500), ("2000", 1000), ("0", 1000)] {
            let settings = of_pod(SourceAddresses::Own, &[(name, asked), ("another", "x")]);
            assert_eq!(
                settings.unwrap().to_guest.bytes_per_second,
                wanted,
                "{asked}"
            );
        }
        let other = ("io.bulkhead.network.from_guest_frames_per_second", "7");
        let settings = of_pod(SourceAddresses::Own, &[other]).unwrap();
        assert_eq!(settings.from_guest.frames_per_second, 7);
    }

    #[test]
    fn any_source_takes_the_hosts_permission() {
        use SourceAddresses::{Annotated, Any, Own};
        let name = "io.bulkhead.network.source_addresses";
        for (config, asked, wanted) in [
            (Own, None, Some(true)),
            (Own, Some("own"), Some(true)),
            (Own, Some("any"), None),
            (Annotated, None, Some(true)),
            (Annotated, Some("any"), Some(false)),
            (Any, None, Some(false)),
            (Any, Some("own"), Some(true)),
            (Any, Some("all"), None),
        ] {
            let annotations: Vec<_> = asked.map(|asked| (name, asked)).into_iter().collect();
            let found = of_pod(config, &annotations);
            let found = found.ok().map(|settings| settings.own_addresses_only);
            assert_eq!(found, wanted, "{config:?} {asked:?}");
        }
    }

    #[test]
    fn errors_name_the_annotation() {
        for (key, value, wanted) in [
            ("to_guest_bytes_per_second", "1M", "\"1M\" is not"),
            ("speed", "1", "no such setting"),
            (
                "source_addresses",
                "any",
                "source_addresses = \"annotated\"",
            ),
            ("source_addresses", "all", "neither"),
        ] {
            let name = format!("{PREFIX}{key}");
            let error = of_pod(SourceAddresses::Own, &[(&name, value)]);
            let error = error.unwrap_err().to_string();
            assert!(error.contains(&name) && error.contains(wanted), "{error}");
        }
    }
}
