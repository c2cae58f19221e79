//! Asking a VMM to save its machine.

use crate::control::ask;
use crate::folder::RuntimeFolder;
use bulkhead_proto::vmm::{Request, Response};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::time::Duration;

/// Pauses between the tries. The VMM refuses while a vsock connection is open, and the guest takes
/// a moment to close its end of the one that the agent was just called by.
const PAUSES: [Duration; 7] = [
    Duration::from_millis(10),
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

/// Has the VMM whose sockets are in `folder` save its machine into two empty files, each answer
/// within `limit`. Blocks.
///
/// # Errors
/// When it refuses to the last, doesn't answer, or the files can't be emptied for another try.
pub(super) fn save(
    folder: &RuntimeFolder,
    mut files: [File; 2],
    limit: Duration,
) -> io::Result<()> {
    let mut pauses = PAUSES.iter();
    loop {
        let message = match ask(folder, &Request::SaveTemplate {}, &files, limit)? {
            Response::Ok => return Ok(()),
            Response::Error { message } => message,
            _ => return Err(io::Error::other("it answered another question")),
        };
        let Some(pause) = pauses.next() else {
            return Err(io::Error::other(message));
        };
        tracing::debug!(message, "the VMM does not save the machine yet");
        std::thread::sleep(*pause);
        for file in &mut files {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::DirBuilderExt;
    use std::os::unix::net::UnixListener;

    /// A VMM's control socket that answers with these lines, one a connection.
    fn answering(lines: &'static [&'static str]) -> (tempfile::TempDir, RuntimeFolder) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .unwrap();
        let listener = UnixListener::bind(path.join("control.sock")).unwrap();
        std::thread::spawn(move || {
            for line in lines {
                let (mut client, _) = listener.accept().unwrap();
                let mut request = String::new();
                BufReader::new(&client).read_line(&mut request).unwrap();
                assert_eq!(request, "{\"request\":\"save_template\"}\n");
                client.write_all(line.as_bytes()).unwrap();
            }
        });
        (dir, RuntimeFolder::at(path))
    }

    fn files() -> [File; 2] {
        [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()]
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_refusal_is_tried_again_with_empty_files() {
        let refused = "{\"response\":\"error\",\"message\":\"a connection is open\"}\n";
        let lines = Box::leak(Box::new([refused, "{\"response\":\"ok\"}\n"]));
        let (_dir, folder) = answering(lines);
        let mut files = files();
        files[0].write_all(b"a first try's").unwrap();
        let [memory, _] = &files;
        let memory = memory.try_clone().unwrap();
        save(&folder, files, LIMIT).unwrap();
        assert_eq!(memory.metadata().unwrap().len(), 0);
    }

    #[test]
    fn nonsense_and_silence_are_errors() {
        for (lines, wanted) in [
            (&["what?\n"][..], "expected value"),
            (&[""][..], "without an answer"),
            (&["{\"response\":\"ok\""][..], "EOF"),
        ] {
            let (_dir, folder) = answering(Box::leak(lines.to_vec().into_boxed_slice()));
            let error = save(&folder, files(), LIMIT).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
