//! Files of a volume behave in the guest as they do on the host: one program uses a folder of the
//! host's and, in the guest, another one, and must see the same.

use bulkhead_tests::Artifacts;
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const V: TaskVersion = TaskVersion::V3;
const SLOW: Duration = Duration::from_secs(120);

/// See there.
const CASES: &str = include_str!("volumes/cases.pl");

/// Runs a command in the container: its output, status last.
pub fn inside(bundle: &Bundle, shim: &Shim<'_>, id: &str, argv: &[&str]) -> String {
    let out = ReadFifo::make(&bundle.beside(id)).unwrap();
    let mut process = able(json!({ "process": process(argv) }));
    let process = process["process"].take();
    let path = out.path();
    shim.exec(V, id, &process, ["", &path, &path]).unwrap();
    shim.start_process(V, id).unwrap();
    let status = shim.wait(V, id).unwrap().exit_status;
    let output = out.read(SLOW);
    let _ = shim.delete(V, id);
    format!("{output}status {status}\n")
}

/// The same on the host, with the same programs.
pub fn outside(root: &Path, argv: &[&str]) -> String {
    let output = Command::new("/usr/sbin/chroot")
        .arg(root)
        .args(argv)
        .env_clear()
        .env("PATH", "/bin:/usr/bin")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let [text, errors] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    format!(
        "{text}{errors}status {}\n",
        output.status.code().unwrap_or(-1)
    )
}

/// By the name of each section, what was printed in it.
fn sections(output: &str) -> BTreeMap<String, String> {
    let parts = output.split("== ").skip(1);
    let split = parts.filter_map(|part| part.split_once('\n'));
    split
        .map(|(name, text)| (name.to_owned(), text.to_owned()))
        .collect()
}

/// Gives a spec's process what root has on the host, as far as it matters for files.
pub fn able(mut spec: Value) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_SETGID",
        "CAP_SETUID",
    ];
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(capabilities);
    }
    spec["process"]["env"] = json!(["PATH=/bin:/usr/bin"]);
    spec
}

pub fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": "bind", "source": source, "options": options })
}

/// The spec of a container that sleeps, with the folder `volume`, which is made, at /volume, and an ext4
/// disk of `mib` MiB, which is made too, at /disk.
pub fn with_a_disk(volume: &Path, disk: &Path, mib: u64) -> Value {
    std::fs::create_dir(volume).unwrap();
    let file = std::fs::File::create(disk).unwrap();
    file.set_len(mib << 20).unwrap();
    let mut made = Command::new("mkfs.ext4");
    let made = made.args(["-q", "-F"]).arg(disk).status();
    assert!(made.unwrap().success());
    let mut spec = able(spec(&["sh", "-c", "sleep 100000; true"]));
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(bind(volume, "/volume", &["rbind", "rw"]));
    mounts.push(
        json!({ "destination": "/disk", "type": "ext4", "source": disk, "options": ["loop"] }),
    );
    spec
}

/// Starts the bundle's container with this spec.
pub fn running<'a>(bundle: &'a Bundle, spec: &Value) -> Shim<'a> {
    bundle.set_spec(spec).unwrap();
    let shim = bundle.start().unwrap();
    shim.create(V, [""; 3]).unwrap();
    shim.start_process(V, "").unwrap();
    shim
}

/// Ends the container and its shim.
pub fn end(shim: &Shim<'_>) {
    shim.kill(V, "", 9, true).unwrap();
    shim.wait(V, "").unwrap();
    shim.delete(V, "").unwrap();
    shim.shutdown(V).unwrap();
}

pub fn files(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "files", "").unwrap();
    let rootfs = bundle.path().join("rootfs");
    let volume = bundle.beside("volume");
    let nested = bundle.beside("nested");
    let Some(shim) = checks.require("a container with volumes", || {
        std::fs::create_dir(&volume).unwrap();
        std::fs::create_dir_all(nested.join("below")).unwrap();
        let (kind, none) = (Some("tmpfs"), nix::mount::MsFlags::empty());
        nix::mount::mount(kind, &nested.join("below"), kind, none, Some("size=64k")).unwrap();
        std::fs::write(nested.join("below/file"), "below\n").unwrap();
        // Perl and what it needs, of the host's.
        std::fs::write(rootfs.join("cases.pl"), CASES).unwrap();
        let usr = rootfs.join("usr");
        std::fs::create_dir(&usr).unwrap();
        for name in ["lib", "lib64"] {
            symlink(format!("usr/{name}"), rootfs.join(name)).unwrap();
        }
        let bound = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some("/usr"), &usr, None::<&str>, bound, None::<&str>).unwrap();
        let mut spec = able(spec(&["sh", "-c", "sleep 100000; true"]));
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(bind(&volume, "/volume", &["rbind", "rw"]));
        mounts.push(bind(&nested, "/flat", &["bind", "ro"]));
        mounts.push(bind(&nested, "/deep", &["rbind", "rro"]));
        running(&bundle, &spec)
    }) else {
        return;
    };
    let ran = checks.require("the cases run to their end", || {
        std::fs::create_dir(rootfs.join("tmp/host")).unwrap();
        let run = |folder| ["perl", "/cases.pl", folder];
        let host = outside(&rootfs, &run("/tmp/host"));
        assert!(host.ends_with("== end\nstatus 0\n"), "on the host: {host}");
        let guest = inside(&bundle, &shim, "cases", &run("/volume"));
        assert!(
            guest.ends_with("== end\nstatus 0\n"),
            "in the guest: {guest}"
        );
        (sections(&host), sections(&guest))
    });
    if let Some((host, guest)) = ran {
        for (name, text) in &host {
            checks.check(&format!("as on the host: {name}"), || {
                assert_eq!(guest.get(name), Some(text), "the guest's, and the host's");
            });
        }
    }
    checks.check("read-only, and read-only with all mounts below", || {
        let script =
            "cat /deep/below/file; ls /flat/below; touch /flat/x /deep/x /deep/below/x 2>&1; true";
        let output = inside(&bundle, &shim, "readonly", &["sh", "-c", script]);
        let (content, refused) = output.split_once('\n').unwrap();
        assert_eq!(content, "below", "{output}");
        assert_eq!(
            refused.matches("Read-only file system").count(),
            3,
            "{output}"
        );
    });
    checks.check("ends, and leaves the volumes alone", || {
        end(&shim);
        assert!(std::fs::read_dir(&volume).unwrap().count() > 10);
        let below = std::fs::read_to_string(nested.join("below/file"));
        nix::mount::umount(&nested.join("below")).unwrap();
        assert_eq!(below.unwrap(), "below\n");
    });
}
