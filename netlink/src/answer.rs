//! The kernel's answers, as far as netlink(7) itself goes: acknowledgements, errors, ends.

use crate::NetlinkError;
use std::io;

/// Length of a message's header, struct nlmsghdr.
const HEADER: usize = 16;
/// Behind the header of an error: its number, and the header of what it answers.
const ERROR_HEADER: usize = HEADER + 4;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// The list that is being read has changed.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// The request isn't repeated in full behind the error.
const NLM_F_CAPPED: u16 = 0x100;
/// Attributes follow behind that.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The attribute that holds the error in words.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// One message of an answer, and the number of the request that it answers.
#[derive(Debug)]
pub enum Answer<'a> {
    /// Done as asked.
    Ack { sequence: u32 },
    /// Refused.
    Error {
        sequence: u32,
        cause: io::Error,
        hint: String,
    },
    /// The list is complete.
    Done { sequence: u32, interrupted: bool },
    /// An entry of a list, header included.
    Message {
        sequence: u32,
        interrupted: bool,
        bytes: &'a [u8],
    },
}

/// The messages of one datagram.
pub fn parts(mut datagram: &[u8]) -> Result<Vec<Answer<'_>>, NetlinkError> {
    let mut found = Vec::new();
    while !datagram.is_empty() {
        let short = || NetlinkError::Nonsense(format!("{} bytes are left over", datagram.len()));
        let length = usize::try_from(u32_at(datagram, 0).ok_or_else(short)?).unwrap_or(usize::MAX);
        if length < HEADER {
            return Err(short());
        }
        let bytes = datagram.get(..length).ok_or_else(short)?;
        found.push(part(bytes).ok_or_else(short)?);
        let padded = length.next_multiple_of(4).min(datagram.len());
        datagram = &datagram[padded..];
    }
    Ok(found)
}

fn part(bytes: &[u8]) -> Option<Answer<'_>> {
    let kind = u16_at(bytes, 4)?;
    let flags = u16_at(bytes, 6)?;
    let sequence = u32_at(bytes, 8)?;
    let interrupted = flags & NLM_F_DUMP_INTR != 0;
    let number = |bytes| u32_at(bytes, HEADER).map(u32::cast_signed);
    Some(match kind {
        NLMSG_ERROR => match number(bytes)? {
            0 => Answer::Ack { sequence },
            errno => Answer::Error {
                sequence,
                cause: io::Error::from_raw_os_error(errno.saturating_neg()),
                hint: hint(bytes, flags).unwrap_or_default(),
            },
        },
        // Its number is that of an error in the middle of the list.
        NLMSG_DONE => match number(bytes) {
            Some(errno) if errno < 0 => Answer::Error {
                sequence,
                cause: io::Error::from_raw_os_error(errno.saturating_neg()),
                hint: String::new(),
            },
            _ => Answer::Done {
                sequence,
                interrupted,
            },
        },
        _ => Answer::Message {
            sequence,
            interrupted,
            bytes,
        },
    })
}

/// The error in words, which stands behind what is repeated of the request.
fn hint(bytes: &[u8], flags: u16) -> Option<String> {
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let request = match flags & NLM_F_CAPPED {
        0 => usize::try_from(u32_at(bytes, ERROR_HEADER)?).ok()?,
        _ => HEADER,
    };
    let mut rest = bytes.get(
        ERROR_HEADER
            .checked_add(request)?
            .checked_next_multiple_of(4)?..,
    )?;
    loop {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(4..length)?;
        if u16_at(rest, 2)? == NLMSGERR_ATTR_MSG {
            let text = String::from_utf8_lossy(value);
            return Some(text.trim_end_matches('\0').to_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let found = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(found.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let found = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(found.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn acknowledgements_and_errors_are_told_apart() {
        let request = message(16, 0, &[]);
        let mut body = 0i32.to_ne_bytes().to_vec();
        body.extend(&request);
        let ack = message(NLMSG_ERROR, NLM_F_CAPPED, &body);
        assert!(matches!(
            parts(&ack).unwrap()[..],
            [Answer::Ack { sequence: 7 }]
        ));

        body[..4].copy_from_slice(&(-libc::EEXIST).to_ne_bytes());
        body.extend([11, 0, 1, 0]);
        body.extend(b"no way\0\0");
        let error = message(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, &body);
        match &parts(&error).unwrap()[..] {
            [Answer::Error { cause, hint, .. }] => {
                assert_eq!(cause.raw_os_error(), Some(libc::EEXIST));
                assert_eq!(hint, "no way");
            }
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_verdict(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parts(&bytes);
        }

        #[test]
        fn any_error_is_read(body in proptest::collection::vec(any::<u8>(), 4..80), flags: u16) {
            prop_assert_eq!(parts(&message(NLMSG_ERROR, flags, &body)).unwrap().len(), 1);
        }
    }
}
