//! Containers: one file per verb of the protocol, and here what they share, the table.
//!
//! ```text
//!            create                start                init exits
//!  (absent) ───────► creating ──► created ──► running ────────────► stopped
//!      ▲                │ failure     │ init killed                    │
//!      └────────────────┴─────────────┴──────────► stopped ────────────┘ delete
//! ```
//!
//! `stopped` is nowhere stored: a container is stopped when its first process has exited. Verbs
//! run to their end even when the host goes away in the middle, so that nothing is left half
//! made (see `server.rs`).

mod create;
mod delete;
mod exec;
mod identify;
mod pause;
mod pids;
mod prepare;
mod resize;
mod shutdown;
mod signal;
mod start;
mod stats;
mod update;
mod wait;

use crate::cgroups::Cgroup;
use crate::error::{Failure, Kind};
use crate::init::Guest;
use crate::process::{Control, Copiers, Personality, Spawned, Spawner};
use crate::reaper::Child;
use crate::seccomp::Filter;
use crate::storage::{Mounted, Storage};
use crate::streams::PendingStreams;
use crate::users::IdMaps;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most containers at once in one guest.
const MAX_CONTAINERS: usize = 256;

/// Most further processes of one container that have not been deleted.
const MAX_EXECS: usize = 1024;

/// Longest id of a container or of an exec.
const MAX_ID: usize = 128;

/// The id of a container or an exec, fit to be a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id(String);

impl Id {
    /// Checks `id`, which came as `field`.
    pub fn new(field: &str, id: &str) -> Result<Self, Failure> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-+".contains(&byte);
        let first = id
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !first || id.len() > MAX_ID || !id.bytes().all(fits) {
            return Err(Failure::invalid(
                field,
                format!(
                    "{id:?} is not an id: 1 to {MAX_ID} letters, digits, \"_\", \".\", \"-\" or \"+\", beginning with a letter or digit"
                ),
            ));
        }
        Ok(Self(id.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A process of a container, until it is deleted.
#[derive(Debug)]
pub struct Process {
    /// For waiting and signals.
    pub child: Child,
    copiers: Copiers,
}

/// The pid namespace of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pids {
    /// The agent's.
    Guest,
    /// One that was made for it.
    Own,
    /// The pod's or another container's.
    Joined,
}

/// A container, until it is deleted.
#[derive(Debug)]
pub struct Container {
    id: Id,
    init: Process,
    /// Refers to the first process, also after it has exited.
    pidfd: OwnedFd,
    pids: Pids,
    cgroup: Option<Arc<Cgroup>>,
    ids: Option<Arc<IdMaps>>,
    seccomp: Option<Arc<Filter>>,
    personality: Option<Personality>,
    /// Present while the container is created and not yet started.
    waiting: Mutex<Option<Control>>,
    execs: Table<Process>,
    storage: Mounted,
}

/// Entries by id, each of which is either being made or there.
#[derive(Debug)]
pub struct Table<T>(Arc<Mutex<BTreeMap<Id, Option<Arc<T>>>>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Table<T> {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Id, Option<Arc<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an id for something that is about to be made.
    fn reserve(&self, what: &str, id: &Id, limit: usize) -> Result<Reservation<T>, Failure> {
        let mut table = self.lock();
        if table.contains_key(id) {
            return Err(Failure::new(
                Kind::AlreadyExists,
                format!("{what} {:?} already exists", id.as_str()),
            ));
        }
        if table.len() >= limit {
            return Err(Failure::new(
                Kind::ResourceExhausted,
                format!("no more than {limit} at once; delete another {what} first"),
            ));
        }
        table.insert(id.clone(), None);
        Ok(Reservation {
            table: Self(Arc::clone(&self.0)),
            id: id.clone(),
            filled: false,
        })
    }

    fn get(&self, what: &str, id: &Id) -> Result<Arc<T>, Failure> {
        self.lock().get(id).and_then(Clone::clone).ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                format!("there is no {what} {:?}", id.as_str()),
            )
        })
    }

    fn remove(&self, id: &Id) {
        self.lock().remove(id);
    }

    /// Neither is anything there nor being made.
    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn all(&self) -> Vec<Arc<T>> {
        self.lock().values().flatten().cloned().collect()
    }
}

/// An id that is given back unless something is put in its place.
struct Reservation<T> {
    table: Table<T>,
    id: Id,
    filled: bool,
}

impl<T> Reservation<T> {
    fn fill(mut self, entry: T) {
        self.table
            .lock()
            .insert(self.id.clone(), Some(Arc::new(entry)));
        self.filled = true;
    }
}

impl<T> Drop for Reservation<T> {
    fn drop(&mut self) {
        if !self.filled {
            self.table.remove(&self.id);
        }
    }
}

/// Owner of all containers. Clones are the same owner.
#[derive(Clone)]
pub struct Containers {
    guest: Arc<Guest>,
    spawner: Spawner,
    streams: PendingStreams,
    storage: Storage,
    table: Arc<Table<Container>>,
}

impl Containers {
    /// None yet.
    pub fn new(guest: Arc<Guest>, spawner: Spawner, streams: PendingStreams) -> Self {
        let storage = Storage::new(guest.surroundings().storage());
        Self {
            guest,
            storage,
            spawner,
            streams,
            table: Arc::default(),
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Failure> {
        self.table.get("container", &Id::new("container_id", id)?)
    }
}

impl Container {
    /// For what can't be done without a cgroup (only outside a guest there may be none).
    fn cgroup(&self) -> Result<&Cgroup, Failure> {
        self.cgroup.as_deref().ok_or_else(|| {
            Failure::new(
                Kind::FailedPrecondition,
                format!("container {:?} has no cgroup", self.id.as_str()),
            )
        })
    }

    /// Refuses to start anything in a container whose processes stand still.
    fn refuse_paused(&self) -> Result<(), Failure> {
        match &self.cgroup {
            Some(cgroup) if cgroup.is_frozen()? => Err(Failure::new(
                Kind::FailedPrecondition,
                format!(
                    "container {:?} is paused; resume it first",
                    self.id.as_str()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The process that `exec_id` names; the first one if it is empty.
    fn process(self: &Arc<Self>, exec_id: &str) -> Result<Named, Failure> {
        if exec_id.is_empty() {
            return Ok(Named::Init(Arc::clone(self)));
        }
        let id = Id::new("exec_id", exec_id)?;
        let what = format!("exec of container {:?} named", self.id.as_str());
        Ok(Named::Exec(self.execs.get(&what, &id)?))
    }
}

/// A process that a request has named.
enum Named {
    Init(Arc<Container>),
    Exec(Arc<Process>),
}

impl std::ops::Deref for Named {
    type Target = Process;

    fn deref(&self) -> &Process {
        match self {
            Self::Init(container) => &container.init,
            Self::Exec(process) => process,
        }
    }
}

/// Sends a signal to a process that has not been reaped, so that its pid can't be another's.
fn send_signal(pid: i32, signal: i32) -> rustix::io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(crate::syscalls::last_error()),
    }
}

/// Ends a process whose set-up failed, and waits until it is gone.
async fn abandon(spawned: &Spawned) {
    if spawned.child.exit().is_none() {
        let _ = send_signal(spawned.child.pid, libc::SIGKILL);
    }
    spawned.child.wait().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn checks_ids() {
        for id in ["a", "0f3c", "web-1_x.y+z", &"x".repeat(MAX_ID)] {
            assert!(Id::new("id", id).is_ok(), "{id}");
        }
        for id in [
            "",
            ".",
            "..",
            "-a",
            "a/b",
            "a b",
            "ä",
            "a\n",
            &"x".repeat(MAX_ID + 1),
        ] {
            assert!(Id::new("id", id).is_err(), "{id}");
        }
    }

    #[test]
    fn reservations_are_given_back() {
        let table = Table::<u8>::default();
        let id = Id::new("id", "a").expect("an id");
        let other = Id::new("id", "b").expect("an id");
        let reserved = table.reserve("thing", &id, 1).expect("free");
        let kind = |result: Result<Reservation<u8>, Failure>| result.err().map(|f| f.kind);
        assert_eq!(
            kind(table.reserve("thing", &id, 1)),
            Some(Kind::AlreadyExists)
        );
        assert_eq!(
            kind(table.reserve("thing", &other, 1)),
            Some(Kind::ResourceExhausted)
        );
        assert!(
            table.get("thing", &id).is_err(),
            "not there before it is made"
        );
        drop(reserved);
        table.reserve("thing", &id, 1).expect("free again").fill(7);
        assert_eq!(table.get("thing", &id).as_deref(), Ok(&7));
        table.remove(&id);
        assert!(table.get("thing", &id).is_err());
    }

    proptest! {
        #[test]
        fn ids_are_file_names(id: String) {
            if let Ok(id) = Id::new("id", &id) {
                prop_assert!(!id.as_str().contains(['/', '\0']) && id.as_str() != ".." && id.as_str() != ".");
            }
        }
    }
}
