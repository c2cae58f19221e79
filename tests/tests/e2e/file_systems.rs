//! Public programs that test file systems, on the host and in a container: what passes on the host
//! passes on a volume and on a disk, but for differences that are known.

use super::volumes::{end, inside, outside, running, with_a_disk};
use bulkhead_tests::Artifacts;
use bulkhead_tests::artifacts::file_system_programs;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Environment variable with other groups of pjdfstest's cases than [`GROUPS`], separated by blanks:
/// each is the name of a system call. On a KVM that emulates guest kernel mode a case takes a second
/// or two, so all of them are more than one run.
const GROUPS_ENV: &str = "BULKHEAD_FS_GROUPS";

/// Groups of cases that run always.
const GROUPS: &str = "ftruncate utimensat";

/// Cases that a volume fails, by a part of their names: no device nodes can be made there.
const KNOWN: &[&str] = &["::block", "::device", "mknod::changed_times_success::char"];

/// Cases that a disk fails where guest kernel mode is emulated: its times are the guest's clock's,
/// whose tick is stretched there.
const KNOWN_OF_DISKS: &[&str] = &["update_ctime", "utime_now"];

/// pjdfstest's configuration: two users besides 0, and what Linux has.
const SETTINGS: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
[dummy_auth]
entries = [["one", "one"], ["two", "two"]]
"#;

/// What became of each case.
fn results(output: &str) -> BTreeMap<String, String> {
    let lines = output.lines().filter_map(|line| {
        let (name, result) = line.split_once(' ')?;
        let result = result.trim();
        let known = matches!(result, "ok" | "FAILED" | "skipped");
        known.then(|| (name.to_owned(), result.to_owned()))
    });
    lines.collect()
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "fs", "").unwrap();
    let rootfs = bundle.path().join("rootfs");
    let Some(shim) = checks.require("a container with a volume and a disk", || {
        let programs = file_system_programs().unwrap();
        fs::create_dir(rootfs.join("programs")).unwrap();
        for name in ["pjdfstest", "fsx"] {
            fs::copy(programs.join(name), rootfs.join("programs").join(name)).unwrap();
        }
        fs::write(rootfs.join("programs/pjdfstest.toml"), SETTINGS).unwrap();
        fs::create_dir_all(rootfs.join("etc")).unwrap();
        let users =
            "root:x:0:0::/:/bin/sh\none:x:2001:2001::/:/bin/sh\ntwo:x:2002:2002::/:/bin/sh\n";
        fs::write(rootfs.join("etc/passwd"), users).unwrap();
        fs::write(
            rootfs.join("etc/group"),
            "root:x:0:\none:x:2001:\ntwo:x:2002:\n",
        )
        .unwrap();
        fs::create_dir_all(rootfs.join("tmp/host")).unwrap();
        let (volume, disk) = (bundle.beside("volume"), bundle.beside("disk.img"));
        let mut spec = with_a_disk(&volume, &disk, 64);
        // mknod(2) of any number, as on the host.
        spec["linux"]["resources"] = json!({ "devices": [{ "allow": true, "access": "rwm" }] });
        running(&bundle, &spec)
    }) else {
        return;
    };
    posix(checks, &bundle, &shim, &rootfs);
    random(checks, &bundle, &shim, &rootfs);
    checks.check("ends", || end(&shim));
}

fn posix(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>, rootfs: &Path) {
    let groups = std::env::var(GROUPS_ENV).unwrap_or_else(|_| GROUPS.to_owned());
    for group in groups.split_whitespace() {
        let pattern = format!("{group}::");
        let command = |folder: &'static str| {
            let settings = "/programs/pjdfstest.toml";
            let mut command = vec!["/programs/pjdfstest", "-c", settings, "-p", folder];
            command.push(&pattern);
            command.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let Some(host) = checks.require(&format!("pjdfstest's {group} runs on the host"), || {
            let host = command("/tmp/host");
            let output = outside(rootfs, &host.iter().map(String::as_str).collect::<Vec<_>>());
            let host = results(&output);
            let passed = host.values().filter(|result| *result == "ok").count();
            assert!(passed > 2, "{passed}: {output}");
            host
        }) else {
            continue;
        };
        for (folder, known) in [("/volume", KNOWN), ("/disk", KNOWN_OF_DISKS)] {
            let name = format!("pjdfstest's {group}: what passes on the host passes on {folder}");
            checks.check(&name, || {
                let command = command(folder);
                let command: Vec<&str> = command.iter().map(String::as_str).collect();
                let id = format!("{group}-{}", &folder[1..]);
                let output = inside(bundle, shim, &id, &command);
                compare(&host, &results(&output), known, &output);
            });
        }
    }
}

/// Whatever passed on the host has passed, but for what is known.
fn compare(
    host: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
    known: &[&str],
    output: &str,
) {
    let good = |result: Option<&String>| result.is_some_and(|result| result == "ok");
    let passed = host.iter().filter(|(_, result)| good(Some(result)));
    let failed: BTreeSet<&str> = passed
        .map(|(name, _)| name.as_str())
        .filter(|name| !good(found.get(*name)))
        .collect();
    let is_known = |name: &str| known.iter().any(|part| name.contains(part));
    let unknown: Vec<_> = failed.iter().filter(|name| !is_known(name)).collect();
    assert!(unknown.is_empty(), "{unknown:#?}: {output}");
}

fn random(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>, rootfs: &Path) {
    fs::write(rootfs.join("programs/fsx.toml"), FSX).unwrap();
    for folder in ["/volume", "/disk"] {
        checks.check(
            &format!("fsx reads what it has written on {folder}"),
            || {
                let id = format!("random-{}", &folder[1..]);
                let command = "/programs/fsx -q -f /programs/fsx.toml -N 120 -S 7 -P /tmp";
                let script = format!("{command} {folder}/fsx");
                let output = inside(bundle, shim, &id, &["sh", "-c", &script]);
                assert!(output.ends_with("status 0\n"), "{output}");
            },
        );
    }
}

/// fsx's configuration: with maps, truncation, holes and syncs among what it draws.
const FSX: &str = "flen = 65536\n[opsize]\nmax = 16384\n[weights]\nclose_open = 1\nread = 10\nwrite = 10\n\
    mapread = 5\nmapwrite = 5\ntruncate = 3\nfsync = 1\nfdatasync = 1\npunch_hole = 2\nposix_fallocate = 1\n";
