//! The state file: a header that says what it is, and the encoded state.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4 | format version |
//! | 12 | 20 | version of the VMM, padded with zeros |
//! | 32 | 8 | length of the payload in bytes |
//! | 40 | 8 | XXH3-64 of the bytes before this field and of the payload |
//! | 48 | | payload: a [`MachineState`], postcard-encoded |
//!
//! All numbers are little-endian. The state means something only to the VMM version that wrote it.

use thiserror::Error;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::MachineState;

const MAGIC: [u8; 8] = *b"BLKHTMPL";
/// Counts up with every change to anything below [`MachineState`].
pub const FORMAT_VERSION: u32 = 2;
const VMM_VERSION: &str = env!("CARGO_PKG_VERSION");
const VERSION_LEN: usize = 20;
const VERSION_AT: usize = 12;
const LENGTH_AT: usize = 32;
const CHECKSUM_AT: usize = 40;
/// Length of the header in bytes.
pub const HEADER_LEN: usize = 48;
const _: () = assert!(VMM_VERSION.len() <= VERSION_LEN);

/// Longest state file in bytes: 32 vCPUs and the map of a few GiB in single pages.
pub const MAX_STATE: usize = 32 << 20;

/// Why a state file can't be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FormatError {
    /// Not even a header.
    #[error("the state file has {0} bytes, less than its header of {HEADER_LEN}")]
    Short(usize),
    /// More than any machine has.
    #[error("the state file has {0} bytes, at most {MAX_STATE} are read")]
    Long(usize),
    /// Something else.
    #[error("the state file is not one: it begins with {0:02x?} instead of {MAGIC:02x?}")]
    Magic([u8; 8]),
    /// Of another format.
    #[error("the state file has format version {0}, this VMM reads {FORMAT_VERSION}")]
    Format(u32),
    /// Of another VMM.
    #[error("the template was saved by VMM version {0:?}, this is {VMM_VERSION}")]
    Version(String),
    /// Truncated or extended.
    #[error("the state file has {found} bytes, its header says {said}")]
    Length {
        /// The file's length in bytes.
        found: u64,
        /// The header's length and what it says of the payload's.
        said: u64,
    },
    /// Damaged.
    #[error("the state file is damaged: its checksum is {found:016x}, its header says {said:016x}")]
    Checksum {
        /// As computed.
        found: u64,
        /// As in the header.
        said: u64,
    },
    /// Written by a VMM with a mistake, or by somebody else.
    #[error("the state file's payload is not a machine's state: {0}")]
    Payload(String),
}

/// The checksum of a piece of guest memory.
pub fn checksum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// Encodes a state with its header.
///
/// # Errors
/// [`FormatError::Payload`], when the state can't be encoded.
pub fn encode(state: &MachineState) -> Result<Vec<u8>, FormatError> {
    let payload =
        postcard::to_stdvec(state).map_err(|error| FormatError::Payload(error.to_string()))?;
    Ok(seal(&payload))
}

/// Decodes what [`encode`] has made.
///
/// # Errors
/// [`FormatError`], for anything else.
pub fn decode(file: &[u8]) -> Result<MachineState, FormatError> {
    let payload = open(file)?;
    let (state, rest) = postcard::take_from_bytes(payload)
        .map_err(|error| FormatError::Payload(error.to_string()))?;
    if !rest.is_empty() {
        let surplus = format!("{} bytes are left over", rest.len());
        return Err(FormatError::Payload(surplus));
    }
    Ok(state)
}

/// Puts a header before `payload`.
pub(super) fn seal(payload: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER_LEN + payload.len());
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    file.extend_from_slice(VMM_VERSION.as_bytes());
    file.resize(LENGTH_AT, 0);
    file.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    let checksum = checksum_of(&file, payload);
    file.extend_from_slice(&checksum.to_le_bytes());
    file.extend_from_slice(payload);
    file
}

/// Checks the header; gives the payload.
fn open(file: &[u8]) -> Result<&[u8], FormatError> {
    let Some((header, payload)) = file.split_first_chunk::<HEADER_LEN>() else {
        return Err(FormatError::Short(file.len()));
    };
    let magic: [u8; 8] = field(header, 0);
    if magic != MAGIC {
        return Err(FormatError::Magic(magic));
    }
    let format = u32::from_le_bytes(field(header, MAGIC.len()));
    if format != FORMAT_VERSION {
        return Err(FormatError::Format(format));
    }
    let version: [u8; VERSION_LEN] = field(header, VERSION_AT);
    let mut expected = [0; VERSION_LEN];
    expected[..VMM_VERSION.len()].copy_from_slice(VMM_VERSION.as_bytes());
    if version != expected {
        let text = String::from_utf8_lossy(&version);
        return Err(FormatError::Version(text.trim_end_matches('\0').to_owned()));
    }
    let length = u64::from_le_bytes(field(header, LENGTH_AT));
    if length != payload.len() as u64 {
        return Err(FormatError::Length {
            found: file.len() as u64,
            said: length.saturating_add(HEADER_LEN as u64),
        });
    }
    let said = u64::from_le_bytes(field(header, CHECKSUM_AT));
    let found = checksum_of(&header[..CHECKSUM_AT], payload);
    if found != said {
        return Err(FormatError::Checksum { found, said });
    }
    Ok(payload)
}

fn checksum_of(header: &[u8], payload: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.digest()
}

fn field<const N: usize>(header: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}
