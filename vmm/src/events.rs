//! What the parent is told: one JSON line each.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::vmm::Event;

/// Writes events to the parent's pipe; clones write to the same.
#[derive(Clone)]
pub struct EventSink(Arc<Mutex<File>>);

impl EventSink {
    /// Events go to `file`.
    pub fn new(file: File) -> Self {
        Self(Arc::new(Mutex::new(file)))
    }

    /// Sends one event. A parent that no longer listens is not an error: the VM goes on.
    pub fn send(&self, event: &Event) {
        let mut line = match serde_json::to_vec(event) {
            Ok(line) => line,
            Err(error) => return tracing::error!(%error, ?event, "encoding an event"),
        };
        line.push(b'\n');
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(&line) {
            tracing::warn!(%error, ?event, "the parent doesn't take events");
        }
    }
}
