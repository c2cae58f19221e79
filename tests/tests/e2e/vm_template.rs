//! Saving a machine and continuing it, by the VMM's contract alone.

use crate::vm::{ask, boot, end_of};
use crate::vm_container;
use bulkhead_proto::agent::{InfoRequest, InfoResponse};
use bulkhead_proto::guest::AGENT_PORT;
use bulkhead_proto::vmm::{Event, ExitReason, Request, Response, Status};
use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::vm::{TemplatePaths, Vm, VmSpec};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const SHORT: Duration = Duration::from_secs(60);
/// Between saving and continuing: longer than everything else that a clock might gain.
const PAUSE: Duration = Duration::from_secs(5);

/// Makes a template, or the machine that is to continue it, wrong in one place.
type Spoil = fn(&TemplatePaths, &mut VmSpec, &Path, &Artifacts);

pub(crate) fn status(vm: &Vm) -> Status {
    match vm.control(&Request::Status {}).unwrap() {
        Response::Status(status) => status,
        other => panic!("not a status: {other:?}"),
    }
}

fn info(vm: &Vm) -> InfoResponse {
    ask(vm, "Info", &InfoRequest::new()).unwrap_or_else(|error| panic!("{error}; {}", vm.logs()))
}

/// Asks the VM to be saved as soon as the last connection is gone: the guest has its say in that.
fn try_save(vm: &Vm, template: &TemplatePaths) -> Response {
    let end = Instant::now() + SHORT;
    loop {
        match vm.save(&template.create().unwrap()).unwrap() {
            Response::Error { message } if message.contains("vsock") && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(100));
            }
            other => return other,
        }
    }
}

pub(crate) fn save(vm: &Vm, template: &TemplatePaths) {
    let answer = try_save(vm, template);
    assert_eq!(answer, Response::Ok, "{}", vm.logs());
}

/// Why it is not saved.
pub(crate) fn refusal(vm: &Vm, template: &TemplatePaths) -> String {
    match try_save(vm, template) {
        Response::Error { message } => message,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn not_saved(vm: &Vm, files: &[File], why: &str) {
    match vm.save(files).unwrap() {
        Response::Error { message } => assert!(message.contains(why), "{message}"),
        other => panic!("{other:?} instead of {why:?}"),
    }
    assert!(!status(vm).paused);
    info(vm);
}

pub(crate) fn continued(spec: &VmSpec, template: &TemplatePaths, artifacts: &Artifacts) -> Vm {
    let spec = VmSpec {
        template: Some(template.clone()),
        ..spec.clone()
    };
    let vm = spec.start(artifacts).unwrap();
    match vm.event(SHORT).unwrap() {
        Some(Event::Running { .. }) => vm,
        other => panic!("{other:?}; {}", vm.logs()),
    }
}

/// Runs a shell in a container and returns what it has written to /out.
fn container(vm: &Vm, script: &str) -> String {
    vm_container::run(vm, "c", script, |_| {})
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplatePaths::in_folder(folder.path());
    let spec = VmSpec::default();
    let Some(mut vm) = checks.require("boots to the agent's ready message", || {
        boot(&spec, artifacts)
    }) else {
        return;
    };
    let booted = vm.started();
    checks.check("is not saved without two empty files", || {
        let [memory, state] = template.create().unwrap();
        let copy = || memory.try_clone().unwrap();
        not_saved(&vm, &[], "0 came with the request");
        not_saved(&vm, &[copy()], "1 came with the request");
        state.write_all_at(b"x", 0).unwrap();
        not_saved(&vm, &[copy(), state], "must be a regular, empty file");
        let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
        not_saved(&vm, &[copy(), null], "must be a regular, empty file");
    });
    checks.check("is not saved while a connection is open", || {
        let connection = vm.dial(AGENT_PORT).unwrap();
        not_saved(
            &vm,
            &template.create().unwrap(),
            "the vsock device is in use",
        );
        drop(connection);
    });
    checks.check("goes on when the disk is full", || disk_full(&vm));
    let saved = checks.require("is saved once nobody is connected, and ends", || {
        save(&vm, &template);
        assert_eq!(end_of(&mut vm, SHORT), ExitReason::Saved);
        assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(0));
        booted.elapsed()
    });
    drop(vm);
    let Some(age) = saved else { return };
    std::thread::sleep(PAUSE);

    refused(checks, artifacts, &template);
    let clones = checks.require("two go on from it at the same time", || {
        let clones = [(); 2].map(|()| continued(&spec, &template, artifacts));
        for clone in &clones {
            assert!(status(clone).ready && !status(clone).paused);
            info(clone);
        }
        clones
    });
    let Some([first, second]) = clones else {
        return;
    };
    checks.check("each has a share and a memory of its own", || {
        assert_eq!(container(&first, "echo first > /out; cat /out"), "first\n");
        let other = second.share().join("c");
        assert!(!other.exists(), "{}", other.display());
    });
    checks.check("the clock goes on from the saved instant", || {
        clock(&second, age);
    });
    checks.check("a template is removed under the feet of a clone", || {
        std::fs::remove_file(&template.memory).unwrap();
        std::fs::remove_file(&template.state).unwrap();
        info(&first);
    });
    checks.check("a clone whose guest knows files is not saved", || {
        let message = refusal(&first, &template);
        assert!(message.contains("the guest knows"), "{message}");
        info(&first);
    });
}

/// The file system of the memory file takes a fourth of what there is to write.
fn disk_full(vm: &Vm) {
    let small = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
        .arg(small.path())
        .status();
    assert!(mounted.unwrap().success());
    let template = TemplatePaths::in_folder(small.path());
    let message = refusal(vm, &template);
    assert!(message.contains("No space left on device"), "{message}");
    for file in [&template.memory, &template.state] {
        assert_eq!(std::fs::metadata(file).unwrap().len(), 0, "what was begun");
    }
    let unmounted = std::process::Command::new("umount")
        .arg(small.path())
        .status();
    assert!(unmounted.unwrap().success());
    assert!(!status(vm).paused);
    info(vm);
}

/// Time since boot as the guest sees it, against the host's: the saved machine's age and what has
/// passed since it was continued, but not the time in between.
fn clock(vm: &Vm, age: Duration) {
    let asked = vm.started().elapsed();
    let script = "cat /proc/uptime > /out; sleep 2; cat /proc/uptime >> /out";
    let output = container(vm, script);
    let answered = vm.started().elapsed();
    let seconds: Vec<f64> = output
        .lines()
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect();
    let [first, second] = seconds[..] else {
        panic!("{output}")
    };
    let (age, asked, answered) = (
        age.as_secs_f64(),
        asked.as_secs_f64(),
        answered.as_secs_f64(),
    );
    // The guest's clock began some time after the VMM, but not so late; a second for rounding.
    assert!(
        first > asked + age / 3.0 && second < age + answered + 1.0,
        "up {first} to {second} s; saved at {age} s, asked {asked} to {answered} s after"
    );
    assert!(second - first >= 2.0, "{output}");
    assert!(second - first < answered - asked, "{output}");
}

fn refused(checks: &mut Checks, artifacts: &Artifacts, template: &TemplatePaths) {
    let spoils: [(&str, &str, Spoil); 11] = [
        ("no template at all", "begins with", |paths, _, _, _| {
            flip(&paths.state, 0);
        }),
        ("another format", "format version", |paths, _, _, _| {
            flip(&paths.state, 8);
        }),
        ("another VMM", "saved by VMM version", |paths, _, _, _| {
            flip(&paths.state, 12);
        }),
        ("a truncated state", "its header says", |paths, _, _, _| {
            truncate(&paths.state);
        }),
        (
            "a flipped bit in the state",
            "state file is damaged",
            |paths, _, _, _| {
                flip(&paths.state, 5000);
            },
        ),
        (
            "a truncated memory",
            "the state file says",
            |paths, _, _, _| {
                truncate(&paths.memory);
            },
        ),
        (
            "a flipped bit in the memory",
            "memory file is damaged",
            |paths, _, _, _| {
                flip(&paths.memory, 7_654_321);
            },
        ),
        ("another number of vCPUs", "vcpus", |_, spec, _, _| {
            spec.vcpus = 2;
        }),
        (
            "another amount of memory",
            "memory_bytes",
            |_, spec, _, _| {
                spec.memory_mib = 256;
            },
        ),
        (
            "other kernel parameters",
            "command line",
            |_, spec, _, _| {
                spec.kernel_params.push("debug".into());
            },
        ),
        (
            "another root image",
            "block image",
            |_, spec, folder, artifacts| {
                let other = folder.join("rootfs");
                std::fs::copy(artifacts.rootfs(), &other).unwrap();
                flip(&other, 2000);
                spec.rootfs = Some(other);
            },
        ),
    ];
    for (name, why, spoil) in spoils {
        checks.check(&format!("{name} is refused"), || {
            let folder = tempfile::tempdir().unwrap();
            let copy = TemplatePaths::in_folder(folder.path());
            std::fs::copy(&template.memory, &copy.memory).unwrap();
            std::fs::copy(&template.state, &copy.state).unwrap();
            let mut spec = VmSpec {
                template: Some(copy.clone()),
                ..VmSpec::default()
            };
            spoil(&copy, &mut spec, folder.path(), artifacts);
            let mut vm = spec.start(artifacts).unwrap();
            match vm.event(SHORT).unwrap() {
                Some(Event::Exited(ExitReason::TemplateRefused { message })) => {
                    assert!(message.contains(why), "{message}");
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(1));
        });
    }
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn truncate(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
}

pub fn two_cpus(checks: &mut Checks, artifacts: &Artifacts) {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplatePaths::in_folder(folder.path());
    let spec = VmSpec {
        vcpus: 2,
        memory_mib: 192,
        ..VmSpec::default()
    };
    let Some(mut vm) = checks.require("boots with two vCPUs", || boot(&spec, artifacts)) else {
        return;
    };
    checks.check("is saved and saved again from a clone", || {
        save(&vm, &template);
        assert_eq!(end_of(&mut vm, SHORT), ExitReason::Saved);
        let mut clone = continued(&spec, &template, artifacts);
        info(&clone);
        let again = TemplatePaths::in_folder(&folder.path().join("again"));
        std::fs::create_dir(folder.path().join("again")).unwrap();
        save(&clone, &again);
        assert_eq!(end_of(&mut clone, SHORT), ExitReason::Saved);
        std::fs::rename(&again.memory, &template.memory).unwrap();
        std::fs::rename(&again.state, &template.state).unwrap();
    });
    checks.check("both vCPUs go on", || {
        let clone = continued(&spec, &template, artifacts);
        assert_eq!(info(&clone).online_cpus, 2);
        let output = container(
            &clone,
            "busybox taskset 1 true && busybox taskset 2 true && busybox nproc > /out",
        );
        assert_eq!(output, "2\n");
    });
}
