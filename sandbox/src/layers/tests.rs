//! Conversions by the real mkfs.erofs.

use super::*;
use crate::cache::Key;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

struct Dir {
    dir: tempfile::TempDir,
    store: Store,
}

fn dir() -> Option<Dir> {
    if MKFS.find().is_err() || !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED 1 test: it needs mkfs.erofs and root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    Some(Dir { dir, store })
}

impl Dir {
    /// A layer with one file, whose times are the same as those of every other.
    fn layer(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), content).unwrap();
        let file = fs::File::open(path.join("file")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        path
    }

    fn convert(&self, layer: &Path) -> Result<Image, LayerError> {
        let store = &self.store;
        let limit = 1 << 30;
        Converter { store, limit }.image(layer)
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.dir.path().join("store")).unwrap();
        let mut names: Vec<String> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "seen")
            .collect();
        names.sort();
        names
    }
}

#[test]
fn equal_layers_share_an_image_and_a_changed_one_gets_another() {
    let Some(dir) = dir() else { return };
    let (one, two) = (dir.layer("one", "content"), dir.layer("two", "content"));
    let first = dir.convert(&one).unwrap();
    let inode = |image: &Image| fs::metadata(image.path()).unwrap().ino();
    assert_eq!(inode(&first), inode(&dir.convert(&two).unwrap()));
    // By its stamp, and without reading it.
    let begin = std::time::Instant::now();
    assert_eq!(inode(&first), inode(&dir.convert(&one).unwrap()));
    assert!(begin.elapsed() < Duration::from_secs(1));
    // The same length and the same time of modification.
    fs::write(one.join("file"), "CONTENT").unwrap();
    let file = fs::File::open(one.join("file")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let changed = dir.convert(&one).unwrap();
    assert_ne!(first.key(), changed.key());
    assert_eq!(dir.names().len(), 2, "{:?}", dir.names());
    let entries = dir.store.list().unwrap();
    assert!(entries.iter().all(|entry| entry.in_use && entry.bytes > 0));
}

#[test]
fn those_who_start_at_once_make_one_image() {
    let Some(dir) = dir() else { return };
    let layer = dir.layer("one", "content");
    let keys: Vec<Key> = std::thread::scope(|scope| {
        let convert = || dir.convert(&layer).unwrap().key().clone();
        let all: Vec<_> = (0..4).map(|_| scope.spawn(convert)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(keys.iter().all(|key| *key == keys[0]));
    assert_eq!(dir.names(), [format!("{}.erofs", keys[0])]);
}

#[test]
fn the_oldest_images_that_nobody_has_go_when_the_limit_is_reached() {
    let Some(dir) = dir() else { return };
    let layers = ["a", "b", "c"].map(|name| dir.layer(name, name));
    let mut images: Vec<Image> = layers
        .iter()
        .map(|layer| dir.convert(layer).unwrap())
        .collect();
    let keys: Vec<Key> = images.iter().map(|image| image.key().clone()).collect();
    for (image, age) in images.iter().zip([300, 200, 100]) {
        let file = fs::File::open(image.path()).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age))
            .unwrap();
    }
    let size = dir.store.list().unwrap()[0].bytes;
    // The oldest one stays in use.
    images.truncate(1);
    dir.store.enforce_limit(2 * size).unwrap();
    let left = |dir: &Dir| -> Vec<Key> {
        dir.store
            .list()
            .unwrap()
            .into_iter()
            .map(|one| one.key)
            .collect()
    };
    assert_eq!(left(&dir), [keys[0].clone(), keys[2].clone()]);
    assert!(matches!(dir.store.remove(&keys[0]), Err(LayerError::InUse)));
    drop(images);
    assert!(dir.store.remove(&keys[0]).unwrap());
    assert!(!dir.store.remove(&keys[0]).unwrap());
    // What is gone is made again.
    assert_eq!(*dir.convert(&layers[0]).unwrap().key(), keys[0]);
    dir.store.remove(&keys[2]).unwrap();
    dir.store.sweep().unwrap();
    let seen = fs::read_dir(dir.dir.path().join("store/seen")).unwrap();
    assert_eq!(seen.count(), 1);
}

#[test]
fn what_a_killed_conversion_left_is_swept_and_a_failed_one_is_not_tried_at_once() {
    let Some(dir) = dir() else { return };
    let key = Key::of([7; 32]);
    let store = dir.dir.path().join("store");
    for suffix in ["lock", "building", "log"] {
        fs::write(store.join(format!("{key}.{suffix}")), "x").unwrap();
    }
    dir.store.sweep().unwrap();
    assert!(dir.names().is_empty(), "{:?}", dir.names());
    let layer = dir.layer("one", "content");
    let stamp = Stamp::of(&layer).unwrap();
    dir.store.note_failure(&stamp, "no room");
    let error = dir.convert(&layer).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    dir.store.sweep().unwrap();
    assert!(dir.convert(&layer).is_err(), "still noted");
    let small = Converter {
        store: &dir.store,
        limit: 3,
    };
    let error = small.image(&layer).unwrap_err();
    assert!(matches!(error, LayerError::TooLarge { .. }), "{error}");
}
