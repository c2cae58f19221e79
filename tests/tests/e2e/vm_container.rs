//! Containers of a VM without a sandbox: asked of its agent directly.

use crate::vm::ask;
use bulkhead_proto::agent::{
    CreateRequest, CreateResponse, DeleteRequest, DeleteResponse, Process, StartRequest,
    StartResponse, WaitRequest, WaitResponse,
};
use bulkhead_proto::guest::SHARE_MOUNT;
use bulkhead_tests::shim::spec;
use bulkhead_tests::vm::Vm;
use protobuf::Message;
use serde_json::Value;
use std::os::unix::fs::symlink;

/// Applets that scripts call by their names.
const APPLETS: [&str; 4] = ["sh", "cat", "sleep", "dd"];

/// Runs a shell in container `id` to its end and returns what it has written to /out. `change` has
/// the spec before. Any other status than 0 is a failure.
pub(crate) fn run(vm: &Vm, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let root = vm.share().join(id).join("rootfs");
    for folder in ["bin", "dev", "proc", "sys"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let mut spec = spec(&["sh", "-ec", script]);
    spec["root"]["path"] = format!("{SHARE_MOUNT}/{id}/rootfs").into();
    change(&mut spec);
    let container_id = id.to_owned();
    let process = Process {
        container_id: container_id.clone(),
        ..Default::default()
    };
    let _: CreateResponse = asked(
        vm,
        "Create",
        &CreateRequest {
            container_id: container_id.clone(),
            spec_json: spec.to_string().into_bytes(),
            ..Default::default()
        },
    );
    let start = StartRequest {
        container_id,
        ..Default::default()
    };
    let _: StartResponse = asked(vm, "Start", &start);
    let wait = WaitRequest {
        process: Some(process.clone()).into(),
        ..Default::default()
    };
    let ended: WaitResponse = asked(vm, "Wait", &wait);
    let output = std::fs::read_to_string(root.join("out")).unwrap_or_default();
    assert_eq!(ended.exit_status, 0, "{output:?}; {}", vm.logs());
    let delete = DeleteRequest {
        process: Some(process).into(),
        ..Default::default()
    };
    let _: DeleteResponse = asked(vm, "Delete", &delete);
    output
}

/// A call to the agent that can't fail.
#[track_caller]
pub(crate) fn asked<Answer: Message>(vm: &Vm, method: &str, request: &impl Message) -> Answer {
    ask(vm, method, request).unwrap_or_else(|error| panic!("{method}: {error}; {}", vm.logs()))
}
