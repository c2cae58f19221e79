//! Exec and Attach with a terminal.

use super::{Pod, shell_container};
use bulkhead_tests::containerd::Containerd;
use bulkhead_tests::runner::Checks;
use k8s_cri::v1::ContainerState;

pub fn checks(checks: &mut Checks, containerd: &Containerd, pod: &Pod, container: &str) {
    let client = pod.client;
    checks.check("Exec with a terminal: input, size, exit code", || {
        let mut stream = client.exec_terminal(container, &["sh"]).unwrap();
        // The quotes keep the terminal's echo from being taken for the answer.
        stream.type_in("tty && echo 're'ady\n");
        stream.until("ready");
        stream.resize(101, 33);
        stream.type_in("until stty size | grep '33 101'; do :; done; echo 're'sized\n");
        stream.until("resized");
        stream.type_in("exit 42\n");
        let (output, code) = stream.end();
        assert_eq!(code, 42, "{output:?}");
        assert!(output.contains("/dev/pts/"), "{output:?}");
    });
    checks.check("Attach with a terminal, detach, attach again", || {
        let script = "while read word && [ $word != end ]; do echo \"got $word\"; done; exit 7";
        let mut config = shell_container("attached", script);
        (config.tty, config.stdin) = (true, true);
        let id = pod.run(containerd, config);
        for word in ["first", "second"] {
            let mut stream = client.attach_terminal(&id).unwrap();
            stream.type_in(&format!("{word}\n"));
            stream.until(&format!("got {word}"));
            drop(stream);
            let status = client.status(&id).unwrap();
            assert_eq!(status.state(), ContainerState::ContainerRunning);
        }
        let mut stream = client.attach_terminal(&id).unwrap();
        stream.type_in("end\n");
        assert_eq!(client.exited(&id).exit_code, 7);
        // Each word is there twice, as it was typed and in the answer.
        let log = pod.log("attached", 5).join("\n");
        assert!(
            log.contains("got first") && log.contains("got second"),
            "{log}"
        );
    });
}
