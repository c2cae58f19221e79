//! What a set-up process says to the agent, as one packet each on a socket pair.

use crate::error::{Failure, Kind};

/// Longest packet, in bytes: one page, as every page that is touched costs. Longer messages, which
/// only very long paths make, are cut.
pub const MAX_REPORT: usize = 4096;

const READY: u8 = 1;
const FAILED: u8 = 2;

/// One packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// Set up; with a terminal, its master comes along as SCM_RIGHTS.
    Ready,
    /// Given up; the process exits.
    Failed(Failure),
}

impl Report {
    /// As bytes; never empty, since an empty packet can't be told from the end of the stream.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Ready => vec![READY],
            Self::Failed(failure) => {
                let mut packet = vec![FAILED, failure.kind as u8];
                packet.extend(failure.message.bytes().take(MAX_REPORT - 2));
                packet
            }
        }
    }

    /// From bytes; `None` for anything that [`Self::encode`] doesn't make.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        match packet {
            [READY] => Some(Self::Ready),
            [FAILED, kind, message @ ..] => Some(Self::Failed(Failure::new(
                Kind::from_number(*kind)?,
                // The cut may have gone through a character.
                String::from_utf8_lossy(message),
            ))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cuts_long_messages() {
        let report = Report::Failed(Failure::new(Kind::Internal, "ü".repeat(MAX_REPORT)));
        let packet = report.encode();
        assert!(packet.len() <= MAX_REPORT);
        assert!(matches!(Report::decode(&packet), Some(Report::Failed(_))));
    }

    proptest! {
        #[test]
        fn decodes_what_it_encodes(number in 1u8..=6, message in ".{0,200}") {
            let kind = Kind::from_number(number).expect("a kind");
            let report = Report::Failed(Failure::new(kind, message));
            prop_assert_eq!(Report::decode(&report.encode()), Some(report));
        }

        #[test]
        fn decoding_never_panics(packet: Vec<u8>) {
            if let Some(report) = Report::decode(&packet) {
                prop_assert!(!report.encode().is_empty());
            }
        }
    }
}
