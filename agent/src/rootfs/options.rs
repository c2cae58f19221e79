//! Mount options, from the words of fstab(5) and the runtime spec to what the kernel takes.

use rustix::mount::{MountFlags, MountPropagationFlags};

/// Changes to the attributes of a mount, as MOUNT_ATTR_* bits of mount_setattr(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear first.
    pub clear: u64,
}

impl Attributes {
    /// Nothing can be written through the mount.
    pub const READONLY: Self = Self {
        set: libc::MOUNT_ATTR_RDONLY,
        clear: 0,
    };

    /// Whether nothing changes.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn on(&mut self, bits: u64) {
        self.set |= bits;
        self.clear &= !bits;
    }

    fn off(&mut self, bits: u64) {
        self.clear |= bits;
        self.set &= !bits;
    }

    /// The access-time mode is a value of several bits, and the kernel wants all of them cleared
    /// when any of them is set.
    fn access_time(&mut self, mode: u64) {
        self.set = (self.set & !libc::MOUNT_ATTR__ATIME) | mode;
        self.clear |= libc::MOUNT_ATTR__ATIME;
    }
}

/// The options of one mount, sorted by where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// `Some(recursive)` for a bind mount.
    pub bind: Option<bool>,
    /// For a new file system: its flags.
    pub flags: MountFlags,
    /// For a bind mount: changes to the mount itself.
    pub attributes: Attributes,
    /// Changes to the mount and all below it.
    pub recursive_attributes: Attributes,
    /// In the order given.
    pub propagation: Vec<MountPropagationFlags>,
    /// For the file system to read, separated by commas.
    pub data: String,
    /// A tmpfs starts with a copy of what it covers.
    pub copy_up: bool,
    /// What is mounted there already changes.
    pub remount: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            bind: None,
            flags: MountFlags::empty(),
            attributes: Attributes::default(),
            recursive_attributes: Attributes::default(),
            propagation: Vec::new(),
            data: String::new(),
            copy_up: false,
            remount: false,
        }
    }
}

/// What an option does to a new file system, and to a bind mount.
enum Flag {
    On(MountFlags, u64),
    Off(MountFlags, u64),
    Time(MountFlags, u64),
}

impl MountOptions {
    /// Sorts `words`; `Err` is a word that can't be honoured, with the reason.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, (String, String)> {
        let mut options = Self::default();
        for word in words {
            if let Some(flag) = flag(word) {
                options.apply(&flag);
            } else if let Some(attributes) = word.strip_prefix('r').and_then(flag)
                && is_recursive(word)
            {
                options.apply_recursively(&attributes);
            } else if let Some(propagation) = propagation(word) {
                options.propagation.push(propagation);
            } else {
                options.apply_other(word)?;
            }
        }
        if options.remount && options.copy_up {
            let reason = "fills a new file system, not one that is mounted again".to_owned();
            return Err(("tmpcopyup".to_owned(), reason));
        }
        if options.bind.is_some() && !options.data.is_empty() {
            let reason = "not an option of a bind mount".to_owned();
            return Err((options.data, reason));
        }
        Ok(options)
    }

    fn apply(&mut self, flag: &Flag) {
        match *flag {
            Flag::On(flags, attributes) => {
                self.flags |= flags;
                self.attributes.on(attributes);
            }
            Flag::Off(flags, attributes) => {
                self.flags -= flags;
                self.attributes.off(attributes);
            }
            Flag::Time(flags, mode) => {
                let times = MountFlags::NOATIME | MountFlags::RELATIME | MountFlags::STRICTATIME;
                self.flags = (self.flags - times) | flags;
                self.attributes.access_time(mode);
            }
        }
    }

    fn apply_recursively(&mut self, flag: &Flag) {
        let attributes = &mut self.recursive_attributes;
        match *flag {
            Flag::On(_, bits) => attributes.on(bits),
            Flag::Off(_, bits) => attributes.off(bits),
            Flag::Time(_, mode) => attributes.access_time(mode),
        }
    }

    fn apply_other(&mut self, word: &str) -> Result<(), (String, String)> {
        let refused = |reason: &str| Err((word.to_owned(), reason.to_owned()));
        match word {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "tmpcopyup" => self.copy_up = true,
            "defaults" | "" => {}
            "remount" => self.remount = true,
            "idmap" | "ridmap" => {
                return refused("only a bind mount can be id-mapped, which is done on the host");
            }
            _ if word.contains('\0') => return refused("contains a NUL byte"),
            _ => {
                if !self.data.is_empty() {
                    self.data.push(',');
                }
                self.data.push_str(word);
            }
        }
        Ok(())
    }
}

/// The options that set or clear one flag. Those without an attribute have no meaning for a bind
/// mount: they belong to the file system.
fn flag(word: &str) -> Option<Flag> {
    use MountFlags as M;
    Some(match word {
        "ro" => Flag::On(M::RDONLY, libc::MOUNT_ATTR_RDONLY),
        "rw" => Flag::Off(M::RDONLY, libc::MOUNT_ATTR_RDONLY),
        "nosuid" => Flag::On(M::NOSUID, libc::MOUNT_ATTR_NOSUID),
        "suid" => Flag::Off(M::NOSUID, libc::MOUNT_ATTR_NOSUID),
        "nodev" => Flag::On(M::NODEV, libc::MOUNT_ATTR_NODEV),
        "dev" => Flag::Off(M::NODEV, libc::MOUNT_ATTR_NODEV),
        "noexec" => Flag::On(M::NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        "exec" => Flag::Off(M::NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => Flag::On(M::NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        "diratime" => Flag::Off(M::NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => Flag::On(M::NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => Flag::Off(M::NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => Flag::Time(M::NOATIME, libc::MOUNT_ATTR_NOATIME),
        "strictatime" => Flag::Time(M::STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
        // Relative access times are the kernel's default.
        "relatime" | "atime" | "nostrictatime" => {
            Flag::Time(M::RELATIME, libc::MOUNT_ATTR_RELATIME)
        }
        "norelatime" => Flag::Time(M::STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
        "sync" => Flag::On(M::SYNCHRONOUS, 0),
        "async" => Flag::Off(M::SYNCHRONOUS, 0),
        "dirsync" => Flag::On(M::DIRSYNC, 0),
        "lazytime" => Flag::On(M::LAZYTIME, 0),
        "nolazytime" => Flag::Off(M::LAZYTIME, 0),
        "mand" => Flag::On(M::PERMIT_MANDATORY_FILE_LOCKING, 0),
        "nomand" => Flag::Off(M::PERMIT_MANDATORY_FILE_LOCKING, 0),
        "silent" => Flag::On(M::SILENT, 0),
        "loud" => Flag::Off(M::SILENT, 0),
        "iversion" => Flag::On(M::from_bits_retain(libc::MS_I_VERSION as u32), 0),
        "noiversion" => Flag::Off(M::from_bits_retain(libc::MS_I_VERSION as u32), 0),
        _ => return None,
    })
}

/// The options of the runtime spec that go down the tree; `relatime` and others merely begin
/// with an r.
fn is_recursive(word: &str) -> bool {
    matches!(
        word,
        "rro"
            | "rrw"
            | "rnosuid"
            | "rsuid"
            | "rnodev"
            | "rdev"
            | "rnoexec"
            | "rexec"
            | "rnodiratime"
            | "rdiratime"
            | "rrelatime"
            | "rnorelatime"
            | "rnoatime"
            | "ratime"
            | "rstrictatime"
            | "rnostrictatime"
            | "rnosymfollow"
            | "rsymfollow"
    )
}

/// The propagation modes of mount_namespaces(7).
pub fn propagation(name: &str) -> Option<MountPropagationFlags> {
    use MountPropagationFlags as P;
    Some(match name {
        "private" => P::PRIVATE,
        "rprivate" => P::PRIVATE | P::REC,
        "slave" => P::DOWNSTREAM,
        "rslave" => P::DOWNSTREAM | P::REC,
        "shared" => P::SHARED,
        "rshared" => P::SHARED | P::REC,
        "unbindable" => P::UNBINDABLE,
        "runbindable" => P::UNBINDABLE | P::REC,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(words: &str) -> MountOptions {
        MountOptions::parse(words.split(',')).expect(words)
    }

    #[test]
    fn sorts_the_options_of_a_tmpfs() {
        let options = parse("nosuid,noexec,strictatime,mode=755,size=65536k,tmpcopyup");
        assert_eq!(
            options.flags,
            MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::STRICTATIME
        );
        assert_eq!(options.data, "mode=755,size=65536k");
        assert!(options.copy_up && options.bind.is_none());
    }

    #[test]
    fn sorts_the_options_of_a_bind_mount() {
        let options = parse("rbind,rprivate,ro,nosuid,suid,noatime");
        assert_eq!(options.bind, Some(true));
        assert_eq!(
            options.attributes.set,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOATIME
        );
        assert_eq!(
            options.attributes.clear,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR__ATIME
        );
        assert_eq!(options.propagation.len(), 1);
        assert!(options.recursive_attributes.is_empty());
    }

    #[test]
    fn tells_recursive_options_from_others_with_an_r() {
        let options = parse("bind,rro,rnosuid,relatime");
        assert_eq!(
            options.recursive_attributes.set,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID
        );
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_RELATIME);
        assert_eq!(parse("rw").recursive_attributes, Attributes::default());
    }

    #[test]
    fn refuses_what_it_cannot_honour() {
        for words in ["remount,tmpcopyup", "idmap", "bind,size=1k"] {
            assert!(MountOptions::parse(words.split(',')).is_err(), "{words}");
        }
    }

    proptest! {
        #[test]
        fn never_sets_and_clears_the_same_attribute(
            words in proptest::collection::vec(
                proptest::sample::select(vec!["ro", "rw", "rro", "rrw", "noatime", "relatime", "strictatime", "nodev", "dev", "rnoatime"]), 0..8)
        ) {
            let options = MountOptions::parse(words).expect("known words");
            for attributes in [options.attributes, options.recursive_attributes] {
                let both = attributes.set & attributes.clear;
                // The kernel wants the whole access-time field cleared when it is set.
                prop_assert_eq!(both & !libc::MOUNT_ATTR__ATIME, 0);
            }
        }
    }
}
