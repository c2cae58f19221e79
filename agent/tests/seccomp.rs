//! Seccomp filters of real containers.

mod common;

use common::{Agent, host_is_able, read_all, status, with};
use serde_json::json;
use ttrpc::Code;

#[tokio::test]
async fn a_filter_binds_all_processes_of_a_container() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let rules = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
            {"names": ["syslog"], "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    });
    for (id, quiet, flag) in [("c1", true, "1"), ("c2", false, "0")] {
        let spec = agent.spec(id, &["sh", "-c", "cat; exit 4"]);
        let spec = with(spec, "/linux/seccomp", rules.clone());
        let spec = with(spec, "/process/noNewPrivileges", json!(quiet));
        let (tokens, [stdin, _stdout, _stderr]) = agent.streams().await;
        agent.create(id, &spec, tokens).await.expect("created");
        agent.start_container(id).await.expect("started");

        let script = "mkdir /tmp/new; kill -USR1 $$ || echo refused; kill -0 $$ && echo alive; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status";
        let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, "noNewPrivileges": quiet});
        let (tokens, [_stdin, stdout, stderr]) = agent.streams().await;
        agent
            .exec(id, "e1", &process, tokens)
            .await
            .expect("executed");
        assert_eq!(
            read_all(stdout).await,
            format!("refused\nalive\nNoNewPrivs:\t{flag}\nSeccomp:\t2\n")
        );
        let err = read_all(stderr).await;
        assert!(err.contains("No space left on device"), "{err}");
        agent.wait(id, "e1").await.expect("waited");
        drop(stdin);
        assert_eq!(agent.wait(id, "").await.expect("waited").exit_status, 4);
        agent.delete(id, "").await.expect("deleted");
    }
    let spec = agent.spec("c3", &["sh", "-c", "dmesg; echo not reached"]);
    std::os::unix::fs::symlink("busybox", agent.path().join("c3/bin/dmesg")).expect("a link");
    let spec = with(spec, "/linux/seccomp", rules);
    let spec = with(spec, "/process/args", json!(["dmesg"]));
    let (exit, _, _) = agent.run("c3", &spec).await;
    assert_eq!(exit, 128 + 31, "killed by SIGSYS");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_filter_of_few_calls_need_not_allow_the_set_up() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    // What a static program needs, and nothing of what the agent does before.
    let needed = [
        "execve",
        "brk",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "mprotect",
        "mmap",
        "munmap",
        "uname",
        "write",
        "writev",
        "exit",
        "exit_group",
        "getuid",
        "prctl",
        "rt_sigaction",
        "rt_sigprocmask",
        "poll",
        "fcntl",
        "ioctl",
        "sysinfo",
        "newfstatat",
        "fstat",
        "getpid",
        "getppid",
        "futex",
    ];
    let rules = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": needed, "action": "SCMP_ACT_ALLOW"}]});
    for prepared in [false, true] {
        if prepared {
            agent.prepare().await.expect("prepared");
            agent.identify(&[7; 16]).await.expect("identified");
        }
        let id = if prepared { "c2" } else { "c1" };
        let spec = agent.spec(id, &["echo", "hello"]);
        let spec = with(spec, "/linux/seccomp", rules.clone());
        let (exit, out, err) = agent.run(id, &spec).await;
        assert_eq!((exit, out.as_str()), (0, "hello\n"), "{err}");
    }
}

#[tokio::test]
async fn a_filter_that_forbids_the_program_itself_is_told() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let rules = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["execve"], "action": "SCMP_ACT_ERRNO"}]});
    let spec = with(agent.spec("c1", &["true"]), "/linux/seccomp", rules);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    let (code, message) = status(agent.start_container("c1").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("operation not permitted"), "{message}");
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    let refused = with(
        spec,
        "/linux/seccomp/defaultAction",
        json!("SCMP_ACT_NOTIFY"),
    );
    let (code, message) = status(agent.create("c1", &refused, Default::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("SCMP_ACT_NOTIFY"), "{message}");
    agent.assert_nothing_left();
}
