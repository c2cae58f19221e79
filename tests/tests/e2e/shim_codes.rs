//! Every method of the Task service in every state of a task: which are served, and with which
//! code the others are refused. Daemons act on the codes.

use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use bulkhead_tests::{Artifacts, Error, Result};
use containerd_shim_protos::api;
use protobuf::well_known_types::any::Any;
use ttrpc::Code::{
    self, ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED,
};

const V: TaskVersion = TaskVersion::V3;

/// What a call comes to; `None` is an answer.
type Outcome = Option<Code>;

/// A state and, for each call, what it must come to.
type Row = &'static [(&'static str, Outcome)];

const UNKNOWN: Row = &[
    ("State", Some(NOT_FOUND)),
    ("Start", Some(NOT_FOUND)),
    ("Delete", Some(NOT_FOUND)),
    ("Pids", Some(NOT_FOUND)),
    ("Pause", Some(NOT_FOUND)),
    ("Resume", Some(NOT_FOUND)),
    ("Checkpoint", Some(UNIMPLEMENTED)),
    ("Kill", Some(NOT_FOUND)),
    ("Exec", Some(NOT_FOUND)),
    ("ResizePty", Some(NOT_FOUND)),
    ("CloseIO", Some(NOT_FOUND)),
    ("Update", Some(NOT_FOUND)),
    ("Wait", Some(NOT_FOUND)),
    ("Stats", Some(NOT_FOUND)),
    ("Connect", None),
];

const BAD_ID: Row = &[
    ("State", Some(INVALID_ARGUMENT)),
    ("Create", Some(INVALID_ARGUMENT)),
    ("Start", Some(INVALID_ARGUMENT)),
    ("Delete", Some(INVALID_ARGUMENT)),
    ("Pids", Some(INVALID_ARGUMENT)),
    ("Pause", Some(INVALID_ARGUMENT)),
    ("Resume", Some(INVALID_ARGUMENT)),
    ("Kill", Some(INVALID_ARGUMENT)),
    ("Exec", Some(INVALID_ARGUMENT)),
    ("ResizePty", Some(INVALID_ARGUMENT)),
    ("CloseIO", Some(INVALID_ARGUMENT)),
    ("Update", Some(INVALID_ARGUMENT)),
    ("Wait", Some(INVALID_ARGUMENT)),
    ("Stats", Some(INVALID_ARGUMENT)),
    ("Connect", None),
];

const CREATED: Row = &[
    ("State", None),
    ("Create", Some(ALREADY_EXISTS)),
    ("Pids", None),
    ("Pause", Some(FAILED_PRECONDITION)),
    ("Resume", Some(FAILED_PRECONDITION)),
    ("Checkpoint", Some(UNIMPLEMENTED)),
    ("Exec", Some(FAILED_PRECONDITION)),
    ("ResizePty", Some(FAILED_PRECONDITION)),
    ("CloseIO", None),
    ("CloseIO", None),
    ("Update", None),
    ("Stats", None),
    ("Connect", None),
    // A task remains, so the shim does.
    ("Shutdown", None),
    ("State", None),
];

const RUNNING: Row = &[
    ("State", None),
    ("Create", Some(ALREADY_EXISTS)),
    ("Start", Some(FAILED_PRECONDITION)),
    ("Delete", Some(FAILED_PRECONDITION)),
    ("Pids", None),
    ("Checkpoint", Some(UNIMPLEMENTED)),
    ("Resume", Some(FAILED_PRECONDITION)),
    ("Pause", None),
    ("Pause", Some(FAILED_PRECONDITION)),
    ("State", None),
    ("Exec", Some(FAILED_PRECONDITION)),
    ("Stats", None),
    ("Update", None),
    ("Resume", None),
    ("Resume", Some(FAILED_PRECONDITION)),
    ("ResizePty", Some(FAILED_PRECONDITION)),
    ("CloseIO", None),
    ("Update", None),
    ("Stats", None),
    ("Connect", None),
    ("Shutdown", None),
    // The exec `x`, out of order and twice.
    ("Start x", Some(NOT_FOUND)),
    ("Wait x", Some(NOT_FOUND)),
    ("Kill x", Some(NOT_FOUND)),
    ("Exec", None),
    ("Exec", Some(ALREADY_EXISTS)),
    ("State x", None),
    ("Kill x", Some(FAILED_PRECONDITION)),
    ("Delete x", None),
    ("Delete x", Some(NOT_FOUND)),
    ("State x", Some(NOT_FOUND)),
    ("Exec", None),
    ("Start x", None),
    ("Start x", Some(FAILED_PRECONDITION)),
    ("Delete x", Some(FAILED_PRECONDITION)),
    ("ResizePty x", Some(FAILED_PRECONDITION)),
    ("CloseIO x", None),
    ("Kill x", None),
    ("Wait x", None),
    ("Wait x", None),
    ("State x", None),
    ("Start x", Some(FAILED_PRECONDITION)),
    ("Kill x", Some(NOT_FOUND)),
    ("ResizePty x", Some(FAILED_PRECONDITION)),
    ("CloseIO x", None),
    ("Delete x", None),
    ("Delete x", Some(NOT_FOUND)),
];

const EXITED: Row = &[
    ("Wait", None),
    ("Wait", None),
    ("State", None),
    ("Create", Some(ALREADY_EXISTS)),
    ("Start", Some(FAILED_PRECONDITION)),
    ("Kill", Some(NOT_FOUND)),
    ("Kill", Some(NOT_FOUND)),
    ("Pids", None),
    ("Pause", Some(FAILED_PRECONDITION)),
    ("Resume", Some(FAILED_PRECONDITION)),
    ("Checkpoint", Some(UNIMPLEMENTED)),
    ("Exec", Some(FAILED_PRECONDITION)),
    ("ResizePty", Some(FAILED_PRECONDITION)),
    ("CloseIO", None),
    ("Update", Some(NOT_FOUND)),
    ("Stats", None),
    ("Connect", None),
    ("Shutdown", None),
    ("Delete", None),
];

/// A shim and the id that calls name.
struct Task<'a> {
    shim: &'a Shim<'a>,
    bundle: &'a Bundle,
    id: &'a str,
}

/// A request with the id, the exec's id and other fields.
macro_rules! request {
    ($type:ident, $task:expr $(, $field:ident: $value:expr)*) => {
        &api::$type { id: $task.id.into(), $($field: $value,)* ..Default::default() }
    };
}

impl Task<'_> {
    fn call(&self, call: &str) -> Result<()> {
        let (method, exec) = call.split_once(' ').unwrap_or((call, ""));
        let exec_id = exec.to_owned();
        let any = |text: String| {
            Some(Any {
                value: text.into_bytes(),
                ..Default::default()
            })
            .into()
        };
        match method {
            "State" => self
                .ask::<api::StateResponse>(method, request!(StateRequest, self, exec_id: exec_id)),
            "Create" => {
                let bundle = self.bundle.path().display().to_string();
                let request = request!(CreateTaskRequest, self, bundle: bundle);
                self.ask::<api::CreateTaskResponse>(method, request)
            }
            "Start" => self
                .ask::<api::StartResponse>(method, request!(StartRequest, self, exec_id: exec_id)),
            "Delete" => self.ask::<api::DeleteResponse>(
                method,
                request!(DeleteRequest, self, exec_id: exec_id),
            ),
            "Pids" => self.ask::<api::PidsResponse>(method, request!(PidsRequest, self)),
            "Pause" => self.ask::<api::Empty>(method, request!(PauseRequest, self)),
            "Resume" => self.ask::<api::Empty>(method, request!(ResumeRequest, self)),
            "Checkpoint" => self.ask::<api::Empty>(method, request!(CheckpointTaskRequest, self)),
            "Kill" => {
                let request = request!(KillRequest, self, exec_id: exec_id, signal: 9);
                self.ask::<api::Empty>(method, request)
            }
            "Exec" => {
                let spec = any(process(&["sleep", "100000"]).to_string());
                let request = request!(ExecProcessRequest, self, exec_id: "x".into(), spec: spec);
                self.ask::<api::Empty>(method, request)
            }
            "ResizePty" => {
                let request =
                    request!(ResizePtyRequest, self, exec_id: exec_id, width: 80, height: 25);
                self.ask::<api::Empty>(method, request)
            }
            "CloseIO" => {
                let request = request!(CloseIORequest, self, exec_id: exec_id, stdin: true);
                self.ask::<api::Empty>(method, request)
            }
            "Update" => {
                let resources = any(r#"{"pids":{"limit":50}}"#.into());
                let request = request!(UpdateTaskRequest, self, resources: resources);
                self.ask::<api::Empty>(method, request)
            }
            "Wait" => {
                self.ask::<api::WaitResponse>(method, request!(WaitRequest, self, exec_id: exec_id))
            }
            "Stats" => self.ask::<api::StatsResponse>(method, request!(StatsRequest, self)),
            "Connect" => self.ask::<api::ConnectResponse>(method, request!(ConnectRequest, self)),
            "Shutdown" => self.ask::<api::Empty>(method, request!(ShutdownRequest, self)),
            other => panic!("no method {other}"),
        }
    }

    fn ask<Response: protobuf::Message>(
        &self,
        method: &str,
        request: &impl protobuf::Message,
    ) -> Result<()> {
        self.shim.call::<Response>(V, method, request).map(drop)
    }

    /// Makes a row's calls in their order.
    fn expect(&self, row: Row) {
        for (number, (call, wanted)) in row.iter().enumerate() {
            let found = self.call(call);
            let code = match &found {
                Ok(()) => None,
                Err(Error::Rpc { code, .. }) => Some(*code),
                Err(other) => panic!("{call}: {other}"),
            };
            let wanted = wanted.map(|code| code as i32);
            assert_eq!(code, wanted, "{call} (call {number}): {found:?}");
        }
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "codes", "").unwrap();
    bundle.set_spec(&spec(&["sleep", "100000"])).unwrap();
    let Some(shim) = checks.require("the shim starts", || bundle.start().unwrap()) else {
        return;
    };
    let of = |id| Task {
        shim: &shim,
        bundle: &bundle,
        id,
    };
    let task = of("codes");
    checks.check(
        "no machine yet: an id that is unknown, and one that is bad",
        || {
            task.expect(UNKNOWN);
            of("../up").expect(BAD_ID);
        },
    );
    let created = checks.require("create", || task.call("Create").unwrap());
    if created.is_none() {
        return;
    }
    checks.check("created", || task.expect(CREATED));
    checks.check(
        "running, its exec before, during and after its life",
        || {
            task.call("Start").unwrap();
            task.expect(RUNNING);
        },
    );
    checks.check(
        "beside it, an id that is unknown, and one that is bad",
        || {
            of("nobody").expect(UNKNOWN);
            of("../up").expect(BAD_ID);
        },
    );
    checks.check("exited", || {
        task.call("Kill").unwrap();
        task.expect(EXITED);
    });
    checks.check("deleted", || task.expect(UNKNOWN));
    checks.check(
        "create, then delete without a start, then the same id again",
        || {
            task.expect(&[
                ("Create", None),
                ("Delete", None),
                ("Delete", Some(NOT_FOUND)),
                ("Create", None),
                ("Kill", None),
                ("Wait", None),
                ("Start", Some(FAILED_PRECONDITION)),
                ("Delete", None),
            ]);
        },
    );
    checks.check("the shim leaves", || task.call("Shutdown").unwrap());
}
