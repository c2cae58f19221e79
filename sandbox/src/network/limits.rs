//! How fast a pod's interfaces may be: by configuration, and lower than that by its annotations.

use crate::pod::Annotations;
use crate::spec::SpecError;
use serde::Deserialize;

/// Annotations begin so; what follows is the name of a key of the configuration's.
const PREFIX: &str = "io.bulkhead.network.";

/// Limits of each interface of a pod's; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimits {
    /// What the guest gets, in bytes a second, link-layer headers included.
    pub to_guest_bytes_per_second: u64,
    /// What the guest gets, in frames a second.
    pub to_guest_frames_per_second: u64,
    /// What the guest sends, in bytes a second.
    pub from_guest_bytes_per_second: u64,
    /// What the guest sends, in frames a second.
    pub from_guest_frames_per_second: u64,
}

impl RateLimits {
    /// These limits, or lower ones where the annotations ask for them: a pod can't raise what the
    /// host allows it.
    ///
    /// # Errors
    /// When an annotation isn't a number, or none that there is.
    pub(crate) fn lowered_by(mut self, annotations: &Annotations) -> Result<Self, SpecError> {
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
                _ => return Err(wrong("there is no such limit of the network".into())),
            };
            let asked = value.parse::<u64>();
            let asked = asked.map_err(|_| wrong(format!("{value:?} is not a whole number")))?;
            *limit = match (*limit, asked) {
                (limit, 0) => limit,
                (0, asked) => asked,
                (limit, asked) => limit.min(asked),
            };
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lowered(annotations: &[(&str, &str)]) -> Result<RateLimits, SpecError> {
        let limits = RateLimits {
            to_guest_bytes_per_second: 1000,
            ..Default::default()
        };
        let annotations = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        limits.lowered_by(&annotations.collect())
    }

    #[test]
    fn annotations_lower_and_never_raise() {
        let name = "io.bulkhead.network.to_guest_bytes_per_second";
        for (asked, wanted) in [("500", 500), ("2000", 1000), ("0", 1000)] {
            let limits = lowered(&[(name, asked), ("another", "x")]).unwrap();
            assert_eq!(limits.to_guest_bytes_per_second, wanted, "{asked}");
        }
        let other = ("io.bulkhead.network.from_guest_frames_per_second", "7");
        assert_eq!(lowered(&[other]).unwrap().from_guest_frames_per_second, 7);
    }

    #[test]
    fn errors_name_the_annotation() {
        for (name, value, wanted) in [
            (
                "io.bulkhead.network.to_guest_bytes_per_second",
                "1M",
                "\"1M\" is not",
            ),
            ("io.bulkhead.network.speed", "1", "no such limit"),
        ] {
            let error = lowered(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(wanted), "{error}");
        }
    }
}
