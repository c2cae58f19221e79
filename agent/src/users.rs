//! User namespaces: which ids of the guest the ids of a container are.

use crate::error::{Context, Failure};
use oci_spec::runtime::{Linux, LinuxIdMapping};
use std::fmt::Write;

/// Most lines that the kernel takes in a map (user_namespaces(7)).
const MAX_RANGES: usize = 340;

/// The maps of a user namespace. Both have the container's id 0, which sets the container up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl IdMaps {
    /// Checks `linux.uidMappings` and `linux.gidMappings`; `None` for a container that has no user
    /// namespace.
    pub fn new(linux: &Linux, has_user: bool) -> Result<Option<Self>, Failure> {
        let uids = linux.uid_mappings().clone().unwrap_or_default();
        let gids = linux.gid_mappings().clone().unwrap_or_default();
        if !has_user {
            if uids.is_empty() && gids.is_empty() {
                return Ok(None);
            }
            return Err(Failure::invalid(
                "linux.uidMappings",
                "there is no user namespace to map ids in; add one to linux.namespaces",
            ));
        }
        check("linux.uidMappings", &uids)?;
        check("linux.gidMappings", &gids)?;
        Ok(Some(Self { uids, gids }))
    }

    /// Writes the maps of a new user namespace, whose first process `pid` is.
    pub fn write(&self, pid: i32) -> Result<(), Failure> {
        for (file, field, ranges) in [
            ("uid_map", "linux.uidMappings", &self.uids),
            ("gid_map", "linux.gidMappings", &self.gids),
        ] {
            std::fs::write(format!("/proc/{pid}/{file}"), lines(ranges))
                .map_err(|error| Failure::invalid(field, format!("the kernel refuses: {error}")))?;
        }
        Ok(())
    }

    /// The guest's user for one of the container's.
    pub fn user(&self, uid: u32) -> Result<u32, Failure> {
        self.uids
            .iter()
            .find_map(|range| {
                let offset = uid.checked_sub(range.container_id())?;
                (offset < range.size()).then(|| range.host_id().checked_add(offset))?
            })
            .ok_or_else(|| {
                Failure::invalid(
                    "process.user.uid",
                    format!("{uid} is not in linux.uidMappings"),
                )
            })
    }
}

/// Becomes root of the user namespace that the calling process is in.
pub fn become_root() -> Result<(), Failure> {
    use rustix::thread::{Gid, Uid};
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .context(|| "become root of the user namespace")
}

fn lines(ranges: &[LinuxIdMapping]) -> String {
    let mut lines = String::new();
    for range in ranges {
        // Writing to a string doesn't fail.
        let _ = writeln!(
            lines,
            "{} {} {}",
            range.container_id(),
            range.host_id(),
            range.size()
        );
    }
    lines
}

fn check(field: &str, ranges: &[LinuxIdMapping]) -> Result<(), Failure> {
    let refused = |reason: String| Err(Failure::invalid(field, reason));
    if ranges.is_empty() {
        return refused("missing; a user namespace needs them".to_owned());
    }
    if ranges.len() > MAX_RANGES {
        return refused(format!(
            "{} ranges; the kernel takes {MAX_RANGES}",
            ranges.len()
        ));
    }
    for range in ranges {
        let ends = |start: u32| start.checked_add(range.size()).is_some();
        if range.size() == 0 || !ends(range.container_id()) || !ends(range.host_id()) {
            return refused(format!(
                "{} {} {} is not a range of ids",
                range.container_id(),
                range.host_id(),
                range.size()
            ));
        }
    }
    if !ranges.iter().any(|range| range.container_id() == 0) {
        return refused("the container's id 0 must be mapped".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn maps(uids: serde_json::Value, has_user: bool) -> Result<Option<IdMaps>, Failure> {
        let linux = json!({"uidMappings": uids, "gidMappings": uids});
        IdMaps::new(&serde_json::from_value(linux).expect("a spec"), has_user)
    }

    fn range(container: u32, host: u32, size: u32) -> serde_json::Value {
        json!({"containerID": container, "hostID": host, "size": size})
    }

    #[test]
    fn maps_ids() {
        let maps = maps(json!([range(0, 100_000, 10), range(1000, 5, 1)]), true);
        let maps = maps.expect("maps").expect("some");
        assert_eq!(lines(&maps.uids), "0 100000 10\n1000 5 1\n");
        assert_eq!(maps.user(9), Ok(100_009));
        assert_eq!(maps.user(1000), Ok(5));
        assert!(maps.user(10).is_err() && maps.user(1001).is_err());
    }

    #[test]
    fn refuses_what_is_no_map() {
        assert_eq!(maps(json!([]), false), Ok(None));
        for (uids, has_user) in [
            (json!([]), true),
            (json!([range(0, 0, 1)]), false),
            (json!([range(0, 0, 0)]), true),
            (json!([range(1, 0, 5)]), true),
            (json!([range(0, u32::MAX, 2)]), true),
            (json!(vec![range(0, 0, 1); 341]), true),
        ] {
            let failure = maps(uids, has_user).expect_err("refused");
            assert!(
                failure.message.starts_with("linux.uidMappings"),
                "{failure}"
            );
        }
    }

    proptest! {
        #[test]
        fn never_panics(container: u32, host: u32, size: u32, uid: u32) {
            if let Ok(Some(maps)) = maps(json!([range(container, host, size)]), true) {
                let _ = maps.user(uid);
            }
        }
    }
}
