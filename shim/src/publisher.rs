//! Events to the daemon: one task sends them one by one, in the order in which they happened, and
//! keeps trying when the daemon restarts.

use bulkhead_sandbox::{ExitStatus, Notification, RootfsMount, StdioPaths};
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

/// One attempt to send one event.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Between two attempts, doubled each time up to the second value.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// After which an event is given up, so that a daemon gone for good doesn't fill the memory.
const GIVE_UP: Duration = Duration::from_secs(120);

/// Sends `notifications` to the daemon's ttrpc `address` until their senders are gone and all of
/// them are sent. With an empty address they are only logged.
pub async fn publish(
    address: String,
    namespace: String,
    mut notifications: mpsc::UnboundedReceiver<Notification>,
) {
    let mut daemon = Daemon {
        address,
        client: None,
    };
    while let Some(notification) = notifications.recv().await {
        let envelope = envelope(&namespace, notification);
        tracing::debug!(topic = %envelope.topic, "event");
        if daemon.address.is_empty() {
            continue;
        }
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        daemon.send(request).await;
    }
}

/// The daemon's event service, connected when needed.
struct Daemon {
    address: String,
    client: Option<EventsClient>,
}

impl Daemon {
    async fn send(&mut self, request: ForwardRequest) {
        let begin = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            match self.attempt(&request).await {
                Ok(()) => return,
                Err(error) if begin.elapsed() > GIVE_UP => {
                    tracing::error!(%error, topic = %request.envelope.topic, "event lost");
                    return;
                }
                Err(error) => tracing::debug!(%error, "sending an event failed; trying again"),
            }
            self.client = None;
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn attempt(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let address = match self.address.strip_prefix("unix://") {
                    Some(_) => self.address.clone(),
                    None => format!("unix://{}", self.address),
                };
                self.client
                    .insert(EventsClient::new(Client::connect(&address).await?))
            }
        };
        let sent = client.forward(ttrpc::context::with_duration(ATTEMPT), request);
        match timeout(ATTEMPT * 2, sent).await {
            // The daemon has it, whatever it thinks of it: sending it again changes nothing.
            Ok(Err(ttrpc::Error::RpcStatus(status)))
                if status.code() != ttrpc::Code::DEADLINE_EXCEEDED =>
            {
                tracing::warn!(?status, topic = %request.envelope.topic, "the daemon refused an event");
                Ok(())
            }
            Ok(result) => result.map(drop),
            Err(_) => Err(ttrpc::Error::Others("the daemon did not answer".into())),
        }
    }
}

/// The time as containerd writes it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().try_into().unwrap_or_default(),
        ..Default::default()
    }
}

fn envelope(namespace: &str, notification: Notification) -> Envelope {
    let (topic, event) = event(notification);
    Envelope {
        timestamp: MessageField::some(timestamp(SystemTime::now())),
        namespace: namespace.into(),
        topic: topic.into(),
        event: MessageField::some(event),
        ..Default::default()
    }
}

/// The type's name is containerd's own, without the usual prefix.
pub fn any<M: protobuf::MessageFull>(event: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        // Plain strings and numbers can't fail to encode.
        value: event.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

fn event(notification: Notification) -> (&'static str, Any) {
    match notification {
        Notification::Created {
            container,
            bundle,
            rootfs,
            stdio,
            pid,
        } => {
            let mut event = TaskCreate {
                container_id: container.to_string(),
                bundle: bundle.display().to_string(),
                io: MessageField::some(io(stdio)),
                pid,
                ..Default::default()
            };
            // The crate keeps the name of this field's type to itself.
            event.rootfs.resize_with(rootfs.len(), Default::default);
            for (message, mount) in event.rootfs.iter_mut().zip(rootfs) {
                let RootfsMount {
                    kind,
                    source,
                    target,
                    options,
                } = mount;
                (message.type_, message.source) = (kind, source);
                (message.target, message.options) = (target, options);
            }
            (topics::TASK_CREATE_EVENT_TOPIC, any(&event))
        }
        Notification::Started { container, pid } => {
            let event = TaskStart {
                container_id: container.to_string(),
                pid,
                ..Default::default()
            };
            (topics::TASK_START_EVENT_TOPIC, any(&event))
        }
        Notification::ExecAdded { container, exec } => {
            let (container_id, exec_id) = (container.to_string(), exec.to_string());
            let event = TaskExecAdded {
                container_id,
                exec_id,
                ..Default::default()
            };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any(&event))
        }
        Notification::ExecStarted {
            container,
            exec,
            pid,
        } => {
            let (container_id, exec_id) = (container.to_string(), exec.to_string());
            let event = TaskExecStarted {
                container_id,
                exec_id,
                pid,
                ..Default::default()
            };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, any(&event))
        }
        Notification::Paused { container } => {
            let event = TaskPaused {
                container_id: container.to_string(),
                ..Default::default()
            };
            (topics::TASK_PAUSED_EVENT_TOPIC, any(&event))
        }
        Notification::Resumed { container } => {
            let event = TaskResumed {
                container_id: container.to_string(),
                ..Default::default()
            };
            (topics::TASK_RESUMED_EVENT_TOPIC, any(&event))
        }
        Notification::OutOfMemory { container } => {
            let event = TaskOOM {
                container_id: container.to_string(),
                ..Default::default()
            };
            (topics::TASK_OOM_EVENT_TOPIC, any(&event))
        }
        Notification::Exited { process, pid, exit } => {
            let container = process.container.to_string();
            // An init's id is its container's.
            let id = process
                .exec
                .map_or_else(|| container.clone(), |exec| exec.to_string());
            (
                topics::TASK_EXIT_EVENT_TOPIC,
                any(&task_exit(container, id, pid, exit)),
            )
        }
        Notification::Deleted {
            container,
            pid,
            exit,
        } => {
            let event = TaskDelete {
                container_id: container.to_string(),
                pid,
                exit_status: exit.code,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, any(&event))
        }
    }
}

fn task_exit(container_id: String, id: String, pid: u32, exit: ExitStatus) -> TaskExit {
    let exited_at = MessageField::some(timestamp(exit.at));
    TaskExit {
        container_id,
        id,
        pid,
        exit_status: exit.code,
        exited_at,
        ..Default::default()
    }
}

fn io(stdio: StdioPaths) -> TaskIO {
    let StdioPaths {
        stdin,
        stdout,
        stderr,
        terminal,
    } = stdio;
    TaskIO {
        stdin,
        stdout,
        stderr,
        terminal,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use bulkhead_sandbox::ids::{ContainerId, ExecId, ProcessId};
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::Message;
    use std::sync::{Arc, Mutex};
    use ttrpc::r#async::{Server, TtrpcContext};

    /// A daemon's event service that writes down what it gets.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<Envelope>>);

    #[async_trait]
    impl Events for Recorder {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0
                .lock()
                .unwrap()
                .push(request.envelope.unwrap_or_default());
            Ok(Empty::new())
        }
    }

    async fn serve(address: &str, recorder: Arc<Recorder>) -> Server {
        let mut server = Server::new()
            .bind(address)
            .unwrap()
            .register_service(create_events(recorder));
        server.start().await.unwrap();
        server
    }

    fn container() -> ContainerId {
        ContainerId::try_from("c1").unwrap()
    }

    fn exec_added(n: usize) -> Notification {
        let exec = ExecId::try_from(format!("e{n}").as_str()).unwrap();
        Notification::ExecAdded {
            container: container(),
            exec,
        }
    }

    #[tokio::test]
    async fn all_events_arrive_in_order_though_the_daemon_comes_late_and_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.ttrpc");
        let address = format!("unix://{}", path.display());
        let (send, receive) = mpsc::unbounded_channel();
        let publisher = tokio::spawn(publish(path.display().to_string(), "ns".into(), receive));
        for n in 0..20 {
            send.send(exec_added(n)).unwrap();
        }
        sleep(Duration::from_millis(100)).await;
        let recorder = Arc::new(Recorder::default());
        let mut server = serve(&address, recorder.clone()).await;
        let seen = || recorder.0.lock().unwrap().len();
        while seen() < 20 {
            sleep(Duration::from_millis(10)).await;
        }
        server.shutdown().await.unwrap();
        drop(server);
        for n in 20..40 {
            send.send(exec_added(n)).unwrap();
        }
        sleep(Duration::from_millis(100)).await;
        let _ = std::fs::remove_file(&path);
        let _server = serve(&address, recorder.clone()).await;
        drop(send);
        timeout(Duration::from_secs(20), publisher)
            .await
            .unwrap()
            .unwrap();
        let events = recorder.0.lock().unwrap();
        let ids: Vec<_> = events
            .iter()
            .map(|envelope| {
                assert_eq!(envelope.namespace, "ns");
                assert_eq!(envelope.topic, "/tasks/exec-added");
                assert_eq!(envelope.event.type_url, "containerd.events.TaskExecAdded");
                TaskExecAdded::parse_from_bytes(&envelope.event.value)
                    .unwrap()
                    .exec_id
            })
            .collect();
        let wanted: Vec<_> = (0..40).map(|n| format!("e{n}")).collect();
        assert_eq!(ids, wanted);
    }

    #[test]
    fn an_exit_names_its_process() {
        let exit = ExitStatus {
            code: 137,
            at: UNIX_EPOCH + Duration::new(5, 7),
        };
        let exec = Some(ExecId::try_from("e1").unwrap());
        for (exec, wanted) in [(None, "c1"), (exec, "e1")] {
            let process = ProcessId {
                container: container(),
                exec,
            };
            let (topic, any) = event(Notification::Exited {
                process,
                pid: 9,
                exit,
            });
            assert_eq!(topic, "/tasks/exit");
            let exit = TaskExit::parse_from_bytes(&any.value).unwrap();
            assert_eq!(
                (exit.container_id.as_str(), exit.id.as_str()),
                ("c1", wanted)
            );
            assert_eq!(
                (
                    exit.exit_status,
                    exit.exited_at.seconds,
                    exit.exited_at.nanos
                ),
                (137, 5, 7)
            );
        }
    }

    #[tokio::test]
    async fn without_an_address_nothing_waits() {
        let (send, receive) = mpsc::unbounded_channel();
        send.send(exec_added(1)).unwrap();
        drop(send);
        timeout(
            Duration::from_secs(1),
            publish(String::new(), "ns".into(), receive),
        )
        .await
        .unwrap();
    }
}
