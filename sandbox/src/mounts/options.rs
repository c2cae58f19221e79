//! fstab-style mount options to the flags and the data string of mount(2).

use nix::mount::MsFlags;

/// Options as mount(2) takes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    /// Flags of the first call.
    pub flags: MsFlags,
    /// Flags of a second call that only changes propagation; empty for none.
    pub propagation: MsFlags,
    /// What the file system gets, comma-separated.
    pub data: String,
}

/// One option's meaning: a flag to set or to clear.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    let (flag, set) = match option {
        "defaults" => (MsFlags::empty(), true),
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "remount" => (MsFlags::MS_REMOUNT, true),
        "mand" => (MsFlags::MS_MANDLOCK, true),
        "nomand" => (MsFlags::MS_MANDLOCK, false),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "bind" => (MsFlags::MS_BIND, true),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
        _ => return None,
    };
    Some((flag, set))
}

fn propagation(option: &str) -> Option<MsFlags> {
    Some(match option {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED | MsFlags::MS_REC,
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE | MsFlags::MS_REC,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => MsFlags::MS_UNBINDABLE | MsFlags::MS_REC,
        _ => return None,
    })
}

impl Options {
    /// Sorts `options` into flags and data; a later option overrules an earlier one. What is no
    /// known flag is the file system's, which refuses what it doesn't know.
    pub fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            propagation: MsFlags::empty(),
            data: String::new(),
        };
        for option in options.iter().filter(|option| !option.is_empty()) {
            if let Some((flag, set)) = flag(option) {
                parsed.flags.set(flag, set);
            } else if let Some(kind) = propagation(option) {
                parsed.propagation = kind;
            } else {
                if !parsed.data.is_empty() {
                    parsed.data.push(',');
                }
                parsed.data.push_str(option);
            }
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(
            &options
                .iter()
                .map(|option| (*option).into())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let overlay = parse(&["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"]);
        assert_eq!(overlay.flags, MsFlags::empty());
        assert_eq!(
            overlay.data,
            "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b"
        );
        let bind = parse(&["rbind", "ro", "rprivate"]);
        assert_eq!(
            bind.flags,
            MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY
        );
        assert_eq!(bind.propagation, MsFlags::MS_PRIVATE | MsFlags::MS_REC);
        assert_eq!(bind.data, "");
    }

    #[test]
    fn the_last_word_counts() {
        assert_eq!(parse(&["ro", "rw"]).flags, MsFlags::empty());
        assert_eq!(parse(&["rw", "ro"]).flags, MsFlags::MS_RDONLY);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_invented(options in proptest::collection::vec("[a-z]{1,8}(=[a-z/]{1,8})?", 0..10)) {
            let parsed = Options::parse(&options);
            let unknown: Vec<_> = options.iter()
                .filter(|o| flag(o).is_none() && propagation(o).is_none()).cloned().collect();
            prop_assert_eq!(parsed.data, unknown.join(","));
        }
    }
}
