//! Which start of the machine this is, and what must not be the same in two of them.
//!
//! Machines that continue a saved one begin as copies of each other. [`Generation`] remembers
//! whether this guest has been told apart from the others yet ([`Identity::assume`]); until then no
//! container can be created in it.
//!
//! What the agent itself holds of random things when it is saved, and clones therefore share, is
//! the seed of the hash maps of its RPC library (their keys are the host's stream numbers), that of
//! its event loop's choice among tasks, and its own address layout: nothing that a container could
//! profit from. Tokens and ids come from the host, and every container's program is executed after
//! the identity has arrived. Nothing here reads the kernel's boot id, which is made when it is read
//! for the first time.

use crate::error::{Failure, Kind};
use crate::init::Surroundings;
use crate::spec::no_nul;
use crate::syscalls::last_error;
use bulkhead_proto::agent::IdentifyRequest;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Least and most bytes of entropy in one request.
const MIN_ENTROPY: usize = 32;
const MAX_ENTROPY: usize = 256;

/// Longest host name, `__NEW_UTS_LEN` of the kernel.
const MAX_HOSTNAME: usize = 64;

/// Latest wall clock that the kernel takes, in seconds since the epoch (`TIME_SETTOD_SEC_MAX`: 30
/// years before its own clock overflows).
const MAX_WALL_SECONDS: i64 = 8_277_292_036;

/// Requests of random(4): linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// A UUID that no other start of a machine ever had.
pub type GenerationId = [u8; 16];

/// How far this guest is from being itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Booted, and never meant to be saved.
    #[default]
    Booted,
    /// About to be saved, or continued and not told apart yet.
    Prepared,
    /// Told apart.
    Identified(GenerationId),
}

/// Owner of the guest's identity.
#[derive(Debug, Default)]
pub struct Generation(Mutex<State>);

impl Generation {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is about to be saved: whatever continues it needs an identity first.
    pub fn give_up(&self) {
        *self.lock() = State::Prepared;
    }

    /// Refuses containers in a guest that other guests may still be equal to.
    pub fn check(&self) -> Result<(), Failure> {
        match *self.lock() {
            State::Booted | State::Identified(_) => Ok(()),
            State::Prepared => Err(Failure::new(
                Kind::FailedPrecondition,
                "this guest was prepared to be saved and has no identity of its own yet; send Identify first",
            )),
        }
    }

    /// Takes an identity on and remembers that. After a failure the guest still has none.
    pub fn identify(
        &self,
        identity: &Identity<'_>,
        surroundings: &Surroundings,
    ) -> Result<GenerationId, Failure> {
        identity.assume(surroundings)?;
        *self.lock() = State::Identified(identity.generation_id);
        Ok(identity.generation_id)
    }
}

/// What makes a guest different from all others, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity<'a> {
    entropy: &'a [u8],
    wall: Timespec,
    hostname: &'a str,
    generation_id: GenerationId,
}

impl<'a> Identity<'a> {
    /// Checks a request, before anything is changed.
    pub fn new(request: &'a IdentifyRequest) -> Result<Self, Failure> {
        let entropy = request.entropy.as_slice();
        if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy.len()) {
            return Err(Failure::invalid(
                "entropy",
                format!(
                    "{} bytes long; {MIN_ENTROPY} to {MAX_ENTROPY} are taken",
                    entropy.len()
                ),
            ));
        }
        if !(0..=MAX_WALL_SECONDS).contains(&request.wall_seconds) {
            return Err(Failure::invalid(
                "wall_seconds",
                format!("{} is not in 0 to {MAX_WALL_SECONDS}", request.wall_seconds),
            ));
        }
        if request.wall_nanos >= 1_000_000_000 {
            return Err(Failure::invalid(
                "wall_nanos",
                format!("{} is a second or more", request.wall_nanos),
            ));
        }
        no_nul("hostname", request.hostname.as_bytes())?;
        if request.hostname.len() > MAX_HOSTNAME {
            return Err(Failure::invalid(
                "hostname",
                format!(
                    "{} bytes long, the kernel takes {MAX_HOSTNAME}",
                    request.hostname.len()
                ),
            ));
        }
        let generation_id = GenerationId::try_from(request.generation_id.as_slice())
            .ok()
            .filter(|id| *id != GenerationId::default())
            .ok_or_else(|| {
                Failure::invalid(
                    "generation_id",
                    format!(
                        "{} bytes; a UUID of 16 bytes that are not all zero is needed",
                        request.generation_id.len()
                    ),
                )
            })?;
        Ok(Self {
            entropy,
            wall: Timespec {
                tv_sec: request.wall_seconds,
                tv_nsec: request.wall_nanos.into(),
            },
            hostname: &request.hostname,
            generation_id,
        })
    }

    /// Randomness first, since everything else may draw on it.
    fn assume(&self, surroundings: &Surroundings) -> Result<(), Failure> {
        add_entropy(self.entropy)?;
        // Outside of a guest these are the host's.
        if matches!(surroundings, Surroundings::Outside { .. }) {
            return Ok(());
        }
        rustix::time::clock_settime(ClockId::Realtime, self.wall).map_err(|error| match error {
            // Earlier than the time since boot allows.
            Errno::INVAL => Failure::invalid("wall_seconds", "the kernel refuses this time"),
            other => Failure::internal("set the guest's clock", other),
        })?;
        if self.hostname.is_empty() {
            return Ok(());
        }
        rustix::system::sethostname(self.hostname.as_bytes())
            .map_err(|error| Failure::internal("set the guest's host name", error))
    }
}

/// `struct rand_pool_info` of linux/random.h with room for the largest request.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; MAX_ENTROPY],
}

/// Credits `entropy` to the kernel's generator and has it rekeyed from the pool. That invalidates
/// the keys of each CPU, the kernel's batches of random integers and what it shows to the vDSO: all
/// of them compare generations before they give anything out.
fn add_entropy(entropy: &[u8]) -> Result<(), Failure> {
    let failed = |what: &str, error| {
        Failure::internal(
            format!("reseed the kernel's random generator: {what}"),
            error,
        )
    };
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let random = rustix::fs::open("/dev/random", flags, Mode::empty())
        .map_err(|error| failed("open /dev/random", error))?;
    let mut info = RandPoolInfo {
        entropy_bits: 0,
        bytes: 0,
        buffer: [0; MAX_ENTROPY],
    };
    for (to, from) in info.buffer.iter_mut().zip(entropy) {
        *to = *from;
    }
    let bytes = entropy.len().min(MAX_ENTROPY);
    info.bytes = libc::c_int::try_from(bytes).unwrap_or(0);
    info.entropy_bits = info.bytes.saturating_mul(8);
    request(&random, RNDADDENTROPY, &raw const info)
        .map_err(|error| failed("add entropy", error))?;
    request(&random, RNDRESEEDCRNG, std::ptr::null()).map_err(|error| failed("rekey", error))
}

fn request(
    random: &OwnedFd,
    number: libc::c_ulong,
    info: *const RandPoolInfo,
) -> Result<(), Errno> {
    // SAFETY: RNDADDENTROPY reads a rand_pool_info and as many bytes behind it as that says, all
    // within the caller's structure; RNDRESEEDCRNG looks at no argument.
    match unsafe { libc::ioctl(random.as_raw_fd(), number as _, info) } {
        0 => Ok(()),
        _ => Err(last_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request() -> IdentifyRequest {
        IdentifyRequest {
            entropy: vec![1; MIN_ENTROPY],
            wall_seconds: 1_700_000_000,
            wall_nanos: 999_999_999,
            hostname: "pod-1".to_owned(),
            generation_id: vec![7; 16],
            ..Default::default()
        }
    }

    #[test]
    fn takes_what_is_within_its_bounds() {
        let accepted = request();
        let identity = Identity::new(&accepted).expect("an identity");
        assert_eq!(identity.generation_id, [7; 16]);
        let mut nameless = request();
        nameless.hostname.clear();
        nameless.entropy = vec![1; MAX_ENTROPY];
        assert!(Identity::new(&nameless).is_ok());
    }

    #[test]
    fn refuses_by_name_what_is_out_of_bounds() {
        type Change = fn(&mut IdentifyRequest);
        let changes: [(&str, Change); 10] = [
            ("entropy", |r| r.entropy.truncate(MIN_ENTROPY - 1)),
            ("entropy", |r| r.entropy.resize(MAX_ENTROPY + 1, 1)),
            ("wall_seconds", |r| r.wall_seconds = -1),
            ("wall_seconds", |r| r.wall_seconds = i64::MAX),
            ("wall_nanos", |r| r.wall_nanos = 1_000_000_000),
            ("hostname", |r| r.hostname = "x".repeat(65)),
            ("hostname", |r| r.hostname = "a\0b".to_owned()),
            ("generation_id", |r| r.generation_id.clear()),
            ("generation_id", |r| r.generation_id.resize(17, 1)),
            ("generation_id", |r| r.generation_id = vec![0; 16]),
        ];
        for (field, change) in changes {
            let mut refused = request();
            change(&mut refused);
            let failure = Identity::new(&refused).expect_err(field);
            assert_eq!(failure.kind, Kind::InvalidArgument, "{failure}");
            assert!(failure.message.starts_with(field), "{field}: {failure}");
        }
    }

    #[test]
    fn a_prepared_guest_waits_for_its_identity() {
        let generation = Generation::default();
        assert!(generation.check().is_ok(), "a guest that just booted");
        generation.give_up();
        let failure = generation.check().expect_err("no identity");
        assert_eq!(failure.kind, Kind::FailedPrecondition);
        *generation.lock() = State::Identified([7; 16]);
        assert!(generation.check().is_ok());
        generation.give_up();
        assert!(generation.check().is_err(), "an identity isn't inherited");
    }

    proptest! {
        #[test]
        fn never_panics(entropy: Vec<u8>, wall_seconds: i64, wall_nanos: u32, hostname: String, generation_id: Vec<u8>) {
            let request = IdentifyRequest { entropy, wall_seconds, wall_nanos, hostname, generation_id, ..Default::default() };
            if let Ok(identity) = Identity::new(&request) {
                prop_assert!((MIN_ENTROPY..=MAX_ENTROPY).contains(&identity.entropy.len()));
            }
        }
    }
}
