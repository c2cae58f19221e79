//! What can only be refused once a guest boots: the error still comes on the create or start call,
//! and nothing is left.

use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, TaskVersion, spec};
use bulkhead_tests::{Artifacts, Error};
use std::fs;

const V: TaskVersion = TaskVersion::V3;

/// Creates, and starts if that succeeds, and expects a refusal whose message holds each of `texts`.
fn refused(
    checks: &mut Checks,
    artifacts: &Artifacts,
    name: &str,
    settings: &str,
    spoil: impl FnOnce(&Bundle),
    texts: &[&str],
) {
    checks.check(name, || {
        let before = Snapshot::take(&[]);
        {
            let bundle = Bundle::new(artifacts, "refused", settings).unwrap();
            spoil(&bundle);
            let shim = bundle.start().unwrap();
            let with_shim = Snapshot::take(&["file /run/t"]);
            let created = shim.create(V, [""; 3]).map(|_| ());
            let failed = created.and_then(|()| shim.start_process(V, "").map(|_| ()));
            match failed {
                Err(Error::Rpc { message, .. }) => {
                    for text in texts {
                        assert!(message.contains(text), "no {text:?} in: {message}");
                    }
                }
                other => panic!("not refused: {other:?}"),
            }
            let _ = shim.delete(V, "");
            with_shim.assert_nothing_added(&["file /run/t"]);
            let left: Vec<_> = fs::read_dir(bundle.runtime_dir())
                .into_iter()
                .flatten()
                .collect();
            assert!(left.is_empty(), "in the runtime folder: {left:?}");
            shim.shutdown(V).unwrap();
        }
        before.assert_nothing_added(&[]);
    });
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let missing = |bundle: &Bundle| bundle.set_spec(&spec(&["no-such-program", "x"])).unwrap();
    let texts = ["no-such-program", "executable file not found in $PATH"];
    refused(
        checks,
        artifacts,
        "a missing executable is named as runc does",
        "",
        missing,
        &texts,
    );

    let cut = |artifacts: &Artifacts, bytes: usize| {
        fs::read(artifacts.kernel()).unwrap()[..bytes].to_vec()
    };
    let path = "/run/t/cut-vmlinux";
    fs::write(path, cut(artifacts, 70_000)).unwrap();
    let settings = format!("kernel = \"{path}\"\n");
    refused(
        checks,
        artifacts,
        "a kernel cut off in the middle",
        &settings,
        |_| {},
        &["kernel"],
    );
    fs::remove_file(path).unwrap();

    // The superblock is whole, the rest is gone: the guest can't find its PID 1 and panics.
    let path = "/run/t/empty-root";
    let mut image = fs::read(artifacts.rootfs()).unwrap();
    image[2048..].fill(0);
    fs::write(path, image).unwrap();
    let settings = format!("rootfs = \"{path}\"\n");
    refused(
        checks,
        artifacts,
        "a corrupt root image: the guest's panic is told",
        &settings,
        |_| {},
        &["panic"],
    );
    fs::remove_file(path).unwrap();

    let settings = "kernel_params = [\"init=/no/such/init\", \"rdinit=/no/such/init\"]\n";
    let texts = ["panicked", "init"];
    refused(
        checks,
        artifacts,
        "a guest panic is reported with its last lines",
        settings,
        |_| {},
        &texts,
    );
}
