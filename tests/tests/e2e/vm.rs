//! The VMM alone, by its contract: control socket, events, vsock, and every way a VM ends.

use bulkhead_proto::agent::{InfoRequest, InfoResponse, ShutdownRequest, ShutdownResponse};
use bulkhead_proto::guest::AGENT_PORT;
use bulkhead_proto::vmm::{Event, ExitReason, MAX_CONTROL_LINE, Request, Response, VmConfig};
use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::vm::{Vm, VmSpec};
use nix::sys::signal::Signal;
use protobuf::Message;
use std::os::fd::IntoRawFd;
use std::time::Duration;

/// Makes a configuration wrong in one place.
type Spoil = fn(&mut VmConfig);

const BOOT: Duration = Duration::from_secs(180);
const SHORT: Duration = Duration::from_secs(20);
/// A container's whole life may be in one call, on a loaded machine.
const CALL: Duration = Duration::from_secs(240);
/// A boot makes 200, with the memory device 249; without gathering writes it would be 110 more.
const MAX_BOOT_EXITS: u64 = 300;

/// One call to the agent over vsock.
pub(crate) fn ask<Answer: Message>(
    vm: &Vm,
    method: &str,
    request: &impl Message,
) -> Result<Answer, String> {
    let stream = vm.dial(AGENT_PORT).map_err(|error| error.to_string())?;
    // The client closes the descriptor.
    let client = ttrpc::Client::new(stream.into_raw_fd()).map_err(|error| error.to_string())?;
    let mut call = ttrpc::Request::new();
    call.service = "bulkhead.agent.v1.Agent".into();
    call.method = method.into();
    call.timeout_nano = CALL.as_nanos() as i64;
    call.payload = request
        .write_to_bytes()
        .map_err(|error| error.to_string())?;
    let answer = client.request(call).map_err(|error| error.to_string())?;
    Answer::parse_from_bytes(&answer.payload).map_err(|error| error.to_string())
}

pub(crate) fn boot(spec: &VmSpec, artifacts: &Artifacts) -> Vm {
    boot_counted(spec, artifacts).0
}

/// The second value is how often KVM_RUN returned until the agent was ready.
fn boot_counted(spec: &VmSpec, artifacts: &Artifacts) -> (Vm, u64) {
    let vm = spec.start(artifacts).unwrap();
    match vm.wait_ready(BOOT).unwrap() {
        (
            Event::Ready {
                userspace_exits, ..
            },
            _,
        ) => (vm, userspace_exits),
        (other, _) => panic!("{other:?} instead of the ready event"),
    }
}

pub(crate) fn end_of(vm: &mut Vm, timeout: Duration) -> ExitReason {
    loop {
        match vm.event(timeout).unwrap() {
            Some(Event::Exited(reason)) => return reason,
            Some(_) => {}
            None => panic!("the VMM closed its events without a reason; {}", vm.logs()),
        }
    }
}

pub fn contract(checks: &mut Checks, artifacts: &Artifacts) {
    let Some((mut vm, exits)) = checks.require("boots to the agent's ready message", || {
        boot_counted(&VmSpec::default(), artifacts)
    }) else {
        return;
    };
    checks.check("a boot leaves KVM_RUN 300 times at most", || {
        assert!(exits <= MAX_BOOT_EXITS, "{exits}");
    });
    checks.check("status tells state, counters and devices", || {
        let Response::Status(status) = vm.control(&Request::Status {}).unwrap() else {
            panic!("not a status")
        };
        assert!(status.ready && !status.paused, "{status:?}");
        assert!(status.userspace_exits > 0, "{status:?}");
        for device in ["block", "rng", "vsock", "fs", "balloon"] {
            assert!(
                status.devices.iter().any(|found| found == device),
                "{device}: {status:?}"
            );
        }
    });
    checks.check("agent answers over vsock", || {
        let info: InfoResponse = ask(&vm, "Info", &InfoRequest::new()).unwrap();
        assert_eq!(info.online_cpus, 1);
        assert!(info.kernel_release.starts_with("6.12."), "{info:?}");
        let mib = info.memory_total_bytes >> 20;
        assert!((64..=128).contains(&mib), "{mib} MiB of 128");
    });
    checks.check("a port that nobody listens on is refused", || {
        let error = vm.dial(9).unwrap_err().to_string();
        assert!(error.contains("was refused"), "{error}");
    });
    checks.check("pause and resume, each idempotent", || {
        for (request, paused) in [
            (Request::Pause {}, true),
            (Request::Pause {}, true),
            (Request::Resume {}, false),
            (Request::Resume {}, false),
        ] {
            assert_eq!(vm.control(&request).unwrap(), Response::Ok);
            let Response::Status(status) = vm.control(&Request::Status {}).unwrap() else {
                panic!("not a status")
            };
            assert_eq!(status.paused, paused, "after {request:?}");
        }
        let _: InfoResponse = ask(&vm, "Info", &InfoRequest::new()).unwrap();
    });
    checks.check(
        "requests that make no sense are refused and change nothing",
        || {
            for line in ["", "{}", "{\"request\":\"explode\"}", "\u{0}"] {
                let answer = vm.control_line(line).unwrap();
                assert!(
                    answer.contains("\"error\""),
                    "{line:?} was answered by {answer:?}"
                );
            }
            let root_in_use = Request::SetBlockBacking {
                index: 0,
                read_only: true,
            };
            assert!(matches!(
                vm.control(&root_in_use).unwrap(),
                Response::Error { .. }
            ));
            let no_such_slot = Request::SetBlockBacking {
                index: 99,
                read_only: true,
            };
            assert!(matches!(
                vm.control(&no_such_slot).unwrap(),
                Response::Error { .. }
            ));
        },
    );
    checks.check("a line longer than allowed does not end the VMM", || {
        let line = "x".repeat(MAX_CONTROL_LINE * 2);
        let _ = vm.control_line(&line);
        assert!(matches!(
            vm.control(&Request::Status {}).unwrap(),
            Response::Status(_)
        ));
    });
    checks.check(
        "the VMM holds no privilege and no foreign descriptor",
        || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
            let field = |name: &str| {
                let line = status
                    .lines()
                    .find(|line| line.starts_with(name))
                    .unwrap_or_default();
                line.split_whitespace()
                    .nth(1)
                    .unwrap_or_default()
                    .to_owned()
            };
            assert_eq!(field("NoNewPrivs:"), "1");
            assert_eq!(field("Seccomp:"), "2", "a seccomp filter");
            let environment = std::fs::read(format!("/proc/{}/environ", vm.pid())).unwrap();
            assert!(
                environment.is_empty(),
                "{:?}",
                String::from_utf8_lossy(&environment)
            );
            for task in std::fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap() {
                let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
                assert!(
                    status.contains("Seccomp:\t2"),
                    "a thread without a filter: {status}"
                );
            }
        },
    );
    checks.check(
        "shutdown through the agent ends with that reason and status 0",
        || {
            // The connection may break before the answer.
            let _ = ask::<ShutdownResponse>(&vm, "Shutdown", &ShutdownRequest::new());
            assert_eq!(
                end_of(&mut vm, Duration::from_secs(60)),
                ExitReason::GuestShutdown
            );
            assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(0));
        },
    );
}

pub fn two_cpus(checks: &mut Checks, artifacts: &Artifacts) {
    let spec = VmSpec {
        vcpus: 2,
        memory_mib: 256,
        ..VmSpec::default()
    };
    let Some(vm) = checks.require("boots with two vCPUs and 256 MiB", || {
        boot(&spec, artifacts)
    }) else {
        return;
    };
    checks.check("the guest sees both vCPUs and the memory", || {
        let info: InfoResponse = ask(&vm, "Info", &InfoRequest::new()).unwrap();
        assert_eq!(info.online_cpus, 2);
        assert!(
            (160..=256).contains(&(info.memory_total_bytes >> 20)),
            "{info:?}"
        );
    });
}

pub fn ends(checks: &mut Checks, artifacts: &Artifacts) {
    checks.check("stop on request", || {
        let mut vm = VmSpec::default().start(artifacts).unwrap();
        assert!(matches!(
            vm.event(SHORT).unwrap(),
            Some(Event::Running { .. })
        ));
        assert_eq!(vm.control(&Request::Stop {}).unwrap(), Response::Ok);
        assert_eq!(end_of(&mut vm, SHORT), ExitReason::Stopped);
        assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(0));
    });
    checks.check(
        "a panic of the guest is reported with its last lines",
        || {
            let kernel_params = vec![
                "init=/no/such/program".into(),
                "rdinit=/no/such/program".into(),
            ];
            let spec = VmSpec {
                kernel_params,
                ..VmSpec::default()
            };
            let mut vm = spec.start(artifacts).unwrap();
            let reason = end_of(&mut vm, BOOT);
            let ExitReason::GuestPanic { console_tail } = &reason else {
                panic!("{reason:?}")
            };
            assert!(
                console_tail.iter().any(|line| line.contains("panic")),
                "{console_tail:?}"
            );
            assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(1));
        },
    );
    checks.check(
        "killed, it leaves no event behind and its signal as status",
        || {
            use std::os::unix::process::ExitStatusExt;
            let mut vm = VmSpec::default().start(artifacts).unwrap();
            assert!(matches!(
                vm.event(SHORT).unwrap(),
                Some(Event::Running { .. })
            ));
            vm.signal(Signal::SIGKILL);
            assert_eq!(vm.wait_end(SHORT).unwrap().signal(), Some(9));
            assert_eq!(vm.event(SHORT).unwrap(), None);
        },
    );
}

pub fn refused(checks: &mut Checks, artifacts: &Artifacts) {
    let folder = tempfile::tempdir().unwrap();
    let spoiled = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let kernel = std::fs::read(artifacts.kernel()).unwrap();
    let mut other_machine = kernel.clone();
    other_machine[18] = 0xb7; // e_machine: AArch64
    for (name, bytes) in [
        ("an empty kernel", &[][..]),
        (
            "a kernel that is no ELF file",
            &b"#!/bin/sh\necho no kernel\n"[..],
        ),
        ("a kernel cut off after its headers", &kernel[..4096]),
        ("a kernel for another machine", &other_machine),
    ] {
        checks.check(&format!("{name} is refused"), || {
            let kernel = Some(spoiled("kernel", bytes));
            let mut vm = VmSpec {
                kernel,
                ..VmSpec::default()
            }
            .start(artifacts)
            .unwrap();
            let reason = end_of(&mut vm, SHORT);
            let ExitReason::VmmFailed { message } = &reason else {
                panic!("{reason:?}")
            };
            assert!(message.contains("kernel"), "{message}");
            assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(1));
        });
    }
    for (name, text) in [
        ("no configuration", ""),
        ("a configuration that is no JSON", "vcpus = 1"),
        (
            "a configuration with an unknown key",
            r#"{"sandbox_id":"x","vcpu":1}"#,
        ),
    ] {
        checks.check(&format!("{name} is refused"), || {
            let vm = VmSpec::default().prepare(artifacts).unwrap();
            let mut vm = vm.run_with(text).unwrap();
            assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(2));
            assert!(vm.logs().contains("configuration"), "{}", vm.logs());
        });
    }
    let out_of_range: [(&str, Spoil); 6] = [
        ("vcpus", |config| config.vcpus = 0),
        ("vcpus", |config| config.vcpus = 33),
        ("memory_mib", |config| config.memory_mib = 8),
        ("kvm_fd", |config| config.kvm_fd = 55),
        ("serial", |config| config.block[0].serial = "x".repeat(21)),
        ("fd", |config| config.kernel_fd = config.kvm_fd),
    ];
    for (index, (key, spoil)) in out_of_range.into_iter().enumerate() {
        checks.check(
            &format!("value {index} out of range is refused by its key, {key}"),
            || {
                let mut vm = VmSpec::default().prepare(artifacts).unwrap();
                spoil(vm.config_mut());
                let mut vm = vm.run().unwrap();
                assert_eq!(vm.wait_end(SHORT).unwrap().code(), Some(2));
                assert!(vm.logs().contains(key), "{}", vm.logs());
            },
        );
    }
}
