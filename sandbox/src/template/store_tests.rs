//! The store without a VM.

use super::super::key::tests::identity;
use super::*;
use crate::cache::now;
use proptest::prelude::*;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::time::SystemTime;

struct Dir {
    store: Store,
    dir: tempfile::TempDir,
}

fn store() -> Dir {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("new/templates")).unwrap();
    Dir { store, dir }
}

impl Dir {
    /// Puts a template of `memory_mib` into the store whose memory file has that many KiB.
    fn add(&self, memory_mib: u32) -> Key {
        let identity = identity(memory_mib);
        let lock = KeyLock::try_take(&self.store, &identity.key())
            .unwrap()
            .unwrap();
        self.build(&lock, memory_mib);
        lock.key.clone()
    }

    fn build(&self, lock: &KeyLock, memory_mib: u32) -> Template {
        let build = self.store.begin_build(lock).unwrap();
        build.folder().create_bare().unwrap();
        let memory = vec![7; memory_mib as usize * 1024];
        build.create(MEMORY).unwrap().write_all(&memory).unwrap();
        build.create(STATE).unwrap().write_all(b"state").unwrap();
        let description = Description {
            identity: identity(memory_mib),
            created: now(),
            build_ms: 3,
        };
        self.store.publish(lock, build, &description).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names = self.store.names().unwrap();
        names.retain(|name| !name.ends_with(LOCK));
        names.sort();
        names
    }
}

fn read(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_template_appears_whole_is_counted_and_outlives_its_removal() {
    let dir = store();
    assert!(dir.store.find(&identity(128).key()).unwrap().is_none());
    let key = dir.add(128);
    assert_eq!(dir.names(), [key.to_string()]);
    let opened = dir.store.find(&key).unwrap().unwrap();
    opened.note_use();
    opened.note_use();
    let entries = dir.store.list().unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!((&entries[0].key, entries[0].uses), (&key, 2));
    assert!(entries[0].bytes >= 128 << 10, "{}", entries[0].bytes);
    let description = entries[0].description.as_ref().unwrap();
    assert_eq!(description.identity.key(), key);
    assert!(description.identity.is_current());
    assert!(dir.store.remove(&key).unwrap());
    assert!(!dir.store.remove(&key).unwrap());
    assert!(dir.store.names().unwrap().is_empty());
    assert_eq!(read(&opened.memory).len(), 128 << 10);
    assert_eq!(read(&opened.state), b"state");
    opened.note_use();
    assert!(dir.store.find(&key).unwrap().is_none());
}

#[test]
fn a_folder_that_others_could_write_to_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    assert!(Store::existing(&path).unwrap().is_none());
    Store::open(&path).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    for (mode, ok) in [(0o755, true), (0o770, false), (0o702, false)] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(Store::open(&path).is_ok(), ok, "{mode:o}");
    }
    let error = Store::open(&path).unwrap_err().to_string();
    assert!(
        error.contains("template_dir") && error.contains("/t "),
        "{error}"
    );
    let (link, file) = (dir.path().join("link"), dir.path().join("file"));
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    fs::write(&file, "").unwrap();
    assert!(Store::open(&link).is_err() && Store::open(&file).is_err());
}

#[test]
fn the_least_recently_used_go_first_and_never_the_newest_nor_a_locked_one() {
    let dir = store();
    let keys: Vec<Key> = [100, 110, 120, 130].map(|size| dir.add(size)).into();
    let used = |key: &Key, seconds| {
        let path = dir.store.template_path(key).join(USES);
        let time = SystemTime::now() + Duration::from_secs(seconds);
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(time)
            .unwrap();
    };
    for (key, seconds) in keys.iter().zip([40, 10, 20, 30]) {
        used(key, seconds);
    }
    let left = |limit: u64, keep: &Key| {
        dir.store.enforce_limit(limit, keep).unwrap();
        let mut left = dir.names();
        left.sort();
        left
    };
    let names = |of: &[usize]| {
        let mut names: Vec<String> = of.iter().map(|n| keys[*n].to_string()).collect();
        names.sort();
        names
    };
    assert_eq!(left(1 << 30, &keys[3]), names(&[0, 1, 2, 3]));
    // Each template has some blocks beside its memory.
    assert_eq!(left(400 << 10, &keys[3]), names(&[0, 2, 3]));
    let held = KeyLock::try_take(&dir.store, &keys[2]).unwrap().unwrap();
    assert_eq!(left(300 << 10, &keys[3]), names(&[2, 3]));
    drop(held);
    assert_eq!(left(0, &keys[3]), names(&[3]));
}

#[test]
fn what_a_dead_build_left_goes_with_its_vm() {
    let dir = store();
    let (dead, alive) = (identity(128).key(), identity(192).key());
    let lock = KeyLock::try_take(&dir.store, &dead).unwrap().unwrap();
    let build = dir.store.begin_build(&lock).unwrap();
    build.folder().create_bare().unwrap();
    build.create(MEMORY).unwrap();
    let mut vmm = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let process = crate::process_ref::ProcessRef::of(vmm.id()).unwrap();
    let state = crate::folder::StateFile {
        shim: process,
        netns: None,
        vmm: Some(process),
        containers: Default::default(),
        cgroup: None,
    };
    build.folder().write_state(&state).unwrap();
    // As after a SIGKILL: nothing is dropped, but the lock is gone.
    std::mem::forget(build);
    drop(lock);
    fs::create_dir(dir.store.path.join("removing-x")).unwrap();
    let lock = KeyLock::try_take(&dir.store, &alive).unwrap().unwrap();
    let current = dir.store.begin_build(&lock).unwrap();
    dir.store.sweep().unwrap();
    assert!(!process.is_alive());
    vmm.wait().unwrap();
    assert_eq!(dir.names(), [format!("{BUILDING}{alive}")]);
    assert!(dir.store.lock_path(&alive).exists() && !dir.store.lock_path(&dead).exists());
    drop(current);
    assert!(dir.names().is_empty());
}

#[test]
fn a_rebuilt_template_is_not_removed_for_its_predecessors_faults() {
    let dir = store();
    let key = dir.add(128);
    let lock = KeyLock::try_take(&dir.store, &key).unwrap().unwrap();
    let first = dir.store.find(&key).unwrap().unwrap();
    let second = dir.build(&lock, 128);
    dir.store.remove_if_same(&lock, &first).unwrap();
    assert!(dir.store.find(&key).unwrap().is_some());
    dir.store.remove_if_same(&lock, &second).unwrap();
    assert!(dir.store.find(&key).unwrap().is_none());
}

#[test]
fn an_incomplete_template_is_none_and_is_replaced() {
    let dir = store();
    let key = dir.add(128);
    fs::remove_file(dir.store.template_path(&key).join(STATE)).unwrap();
    assert!(dir.store.find(&key).unwrap().is_none());
    fs::create_dir(dir.store.template_path(&key).join(STATE)).unwrap();
    assert!(dir.store.find(&key).unwrap().is_none());
    dir.add(128);
    assert!(dir.store.find(&key).unwrap().is_some());
}

#[test]
fn a_failure_holds_for_a_while() {
    let dir = store();
    let lock = KeyLock::try_take(&dir.store, &identity(128).key())
        .unwrap()
        .unwrap();
    assert_eq!(dir.store.recent_failure(&lock), None);
    dir.store.note_failure(&lock, "no\nroom");
    assert_eq!(dir.store.recent_failure(&lock).unwrap(), "no; room");
    dir.store.forget_failure(&lock);
    assert!(dir.names().is_empty());
    assert!(dir.dir.path().exists());
}

proptest! {
    // Each case makes a store.
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_bytes_in_the_place_of_a_description_are_read_without_a_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..512), cut in any::<usize>(),
    ) {
        let dir = store();
        let key = dir.add(1);
        let path = dir.store.template_path(&key).join(DESCRIPTION);
        fs::write(&path, &bytes).unwrap();
        prop_assert!(dir.store.list().unwrap()[0].description.is_none());
        // A real one, cut anywhere.
        let whole = serde_json::to_vec(&Description {
            identity: identity(1),
            created: 1,
            build_ms: 1,
        })
        .unwrap();
        fs::write(&path, &whole[..cut % whole.len()]).unwrap();
        prop_assert!(dir.store.list().unwrap()[0].description.is_none());
    }
}
