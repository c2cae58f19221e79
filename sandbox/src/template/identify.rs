//! What makes a clone another machine than its template and its siblings.

use bulkhead_proto::agent::IdentifyRequest;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of entropy that a clone is given: twice the state that the guest kernel's generator is
/// keyed with.
const ENTROPY: usize = 64;

/// Longest host name that the kernel takes (sethostname(2)).
const MAX_HOSTNAME: usize = 64;

/// Random bytes from the host's kernel.
pub(super) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// A random UUID (RFC 9562, section 5.4).
fn uuid_v4(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// The request that gives a clone its own identity. A host name that no kernel takes is left out:
/// it's the user's, and the container's own setting of it will say what's wrong with it.
pub(crate) fn request(hostname: Option<&str>) -> io::Result<IdentifyRequest> {
    let acceptable = |name: &&str| {
        name.len() <= MAX_HOSTNAME && name.bytes().all(|byte| byte.is_ascii_graphic())
    };
    let mut request = IdentifyRequest {
        entropy: random::<ENTROPY>()?.to_vec(),
        hostname: hostname.filter(acceptable).unwrap_or_default().to_owned(),
        generation_id: uuid_v4(random()?).to_vec(),
        ..Default::default()
    };
    // Last: what the guest's clock is set to is late by all that comes after it.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    request.wall_seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    request.wall_nanos = now.subsec_nanos();
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_requests_share_anything_random() {
        let requests: Vec<_> = (0..64).map(|_| request(Some("pod")).unwrap()).collect();
        for field in [
            |one: &IdentifyRequest| one.entropy.clone(),
            |one: &IdentifyRequest| one.generation_id.clone(),
        ] {
            let mut values: Vec<_> = requests.iter().map(field).collect();
            values.sort();
            values.dedup();
            assert_eq!(values.len(), requests.len());
        }
        for one in &requests {
            assert_eq!((one.entropy.len(), one.generation_id.len()), (64, 16));
            assert_eq!(one.generation_id[6] >> 4, 4, "version");
            assert_eq!(one.generation_id[8] >> 6, 2, "variant");
            assert_eq!(one.hostname, "pod");
            assert!(one.wall_seconds > 1_700_000_000 && one.wall_nanos < 1_000_000_000);
        }
    }

    #[test]
    fn a_host_name_that_no_kernel_takes_is_left_out() {
        let hostname = |name: Option<&str>| request(name).unwrap().hostname;
        assert_eq!(hostname(None), "");
        assert_eq!(hostname(Some(&"a".repeat(64))), "a".repeat(64));
        assert_eq!(hostname(Some(&"a".repeat(65))), "");
        assert_eq!(hostname(Some("a b\n")), "");
    }
}
