//! Who processes are, what they may do, and what they are told.

mod common;

use common::{Agent, host_is_able, read_all, status, with};
use serde_json::{Value, json};
use ttrpc::Code;

async fn output(agent: &Agent, id: &str, spec: Value, script: &str) -> String {
    let spec = with(spec, "/process/args", json!(["sh", "-c", script]));
    let (status, out, err) = agent.run(id, &spec).await;
    assert_eq!((status, &*err), (0, ""), "{script}: {out}");
    out
}

#[tokio::test]
async fn user_groups_umask_and_home() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let user = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o077});
    let spec = with(agent.spec("c1", &["true"]), "/process/user", user);
    let script = "id -u; id -g; id -G; umask; echo $HOME; echo again > /dev/stdout";
    assert_eq!(
        output(&agent, "c1", spec.clone(), script).await,
        "1000\n1000\n1000 5 6\n0077\n/home/web\nagain\n"
    );
    let spec = with(
        spec,
        "/process/env",
        json!(["PATH=/bin", "HOME=/given", "A=b c"]),
    );
    assert_eq!(
        output(&agent, "c2", spec.clone(), "echo $HOME $A; env | wc -l")
            .await
            .lines()
            .next(),
        Some("/given b c")
    );
    let unknown = with(spec, "/process/user", json!({"uid": 4321, "gid": 0}));
    let unknown = with(unknown, "/process/env", json!(["PATH=/bin"]));
    assert_eq!(output(&agent, "c3", unknown, "echo $HOME").await, "/\n");
}

#[tokio::test]
async fn capabilities_are_exactly_those_of_the_spec() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let chown_and_kill = json!(["CAP_CHOWN", "CAP_KILL"]);
    let sets = json!({"bounding": chown_and_kill, "effective": ["CAP_CHOWN"], "permitted": chown_and_kill,
        "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]});
    let spec = with(agent.spec("c1", &["true"]), "/process/capabilities", sets);
    let spec = with(spec, "/process/user", json!({"uid": 1000, "gid": 1000}));
    let shown = "grep -E '^(Cap|NoNew)' /proc/self/status";
    // The program keeps what is ambient: CAP_KILL is bit 5. CAP_CHOWN, bit 0, goes with the exec.
    let expected = "CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
        CapBnd:\t0000000000000021\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\n";
    assert_eq!(output(&agent, "c1", spec.clone(), shown).await, expected);
    let none = with(spec, "/process/capabilities", Value::Null);
    let none = with(none, "/process/user", json!({"uid": 0, "gid": 0}));
    let none = with(none, "/process/noNewPrivileges", json!(false));
    let zero = "0000000000000000";
    let expected = format!(
        "CapInh:\t{zero}\nCapPrm:\t{zero}\nCapEff:\t{zero}\nCapBnd:\t{zero}\nCapAmb:\t{zero}\nNoNewPrivs:\t0\n"
    );
    assert_eq!(output(&agent, "c2", none, shown).await, expected);
}

#[tokio::test]
async fn limits_and_oom_score_are_set() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let limits = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": u64::MAX},
        {"type": "RLIMIT_RTTIME", "soft": 5, "hard": 6},
    ]);
    let spec = with(agent.spec("c1", &["true"]), "/process/rlimits", limits);
    let spec = with(spec, "/process/oomScoreAdj", json!(555));
    let script = "ulimit -S -n; ulimit -H -n; ulimit -S -c; ulimit -H -c; grep -c 'realtime timeout *5 *6' /proc/self/limits; cat /proc/self/oom_score_adj";
    assert_eq!(
        output(&agent, "c1", spec, script).await,
        "100\n200\n0\nunlimited\n1\n555\n"
    );
}

#[tokio::test]
async fn namespaces_are_its_own() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["true"]);
    let own = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"}, {"type": "time"}]);
    let spec = with(spec, "/linux/namespaces", own);
    let spec = with(
        spec,
        "/linux/timeOffsets",
        json!({"monotonic": {"secs": 864000}, "boottime": {"secs": 864000}}),
    );
    let spec = with(
        spec,
        "/linux/sysctl",
        json!({"kernel.msgmax": "65535", "net.ipv4.ip_forward": "1"}),
    );
    let spec = with(spec, "/domainname", json!("domain"));
    // The shell is started by the exec that moves it into the time namespace.
    let script = "hostname; cat /proc/sys/kernel/domainname; echo $$; ip link show lo | grep -c LOOPBACK,UP; \
        cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward; cat /proc/self/cgroup | grep ^0; \
        for n in pid ipc uts mnt net cgroup time; do readlink /proc/self/ns/$n; done; cat /proc/uptime";
    let inside = output(&agent, "c1", spec, script).await;
    let lines: Vec<&str> = inside.lines().collect();
    assert_eq!(
        lines.get(..7),
        Some(&["inside", "domain", "1", "1", "65535", "1", "0::/"][..]),
        "{inside}"
    );
    let here: Vec<String> = ["pid", "ipc", "uts", "mnt", "net", "cgroup", "time"]
        .iter()
        .map(|kind| {
            std::fs::read_link(format!("/proc/self/ns/{kind}"))
                .expect("a namespace")
                .display()
                .to_string()
        })
        .collect();
    for (inside, outside) in lines[7..14].iter().zip(&here) {
        assert_ne!(inside, outside);
    }
    let uptime = |text: &str| {
        text.split(['.', ' '])
            .next()
            .and_then(|seconds| seconds.parse::<u64>().ok())
            .expect("seconds")
    };
    let outside = uptime(&std::fs::read_to_string("/proc/uptime").expect("uptime"));
    assert!(uptime(lines[14]) >= outside + 863_000, "{inside}");
}

#[tokio::test]
async fn namespaces_of_the_sandbox_are_joined() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let pause = agent.spec("pause", &["sleep", "1000"]);
    let pid = agent
        .create("pause", &pause, Default::default())
        .await
        .expect("created");
    agent.start_container("pause").await.expect("started");
    let path = |kind: &str| format!("/proc/{pid}/ns/{kind}");
    let joined = json!([{"type": "mount"}, {"type": "pid", "path": path("pid")}, {"type": "ipc", "path": path("ipc")},
        {"type": "uts", "path": path("uts")}, {"type": "network", "path": "/var/run/netns/pod"}]);
    let spec = with(agent.spec("c1", &["true"]), "/linux/namespaces", joined);
    let spec = with(spec, "/hostname", json!(""));
    let script =
        "hostname; cat /proc/1/comm; readlink /proc/self/ns/ipc; readlink /proc/self/ns/net";
    let inside = output(&agent, "c1", spec.clone(), script).await;
    let ipc = std::fs::read_link(path("ipc")).expect("a namespace");
    let net = std::fs::read_link("/proc/self/ns/net").expect("a namespace");
    assert_eq!(
        inside,
        format!("inside\nsleep\n{}\n{}\n", ipc.display(), net.display())
    );

    // The agent itself has come back to its own pid namespace: the next container is not inside.
    let plain = agent.spec("c2", &["true"]);
    assert_eq!(
        output(&agent, "c2", plain, "cat /proc/1/comm; true").await,
        "sh\n"
    );

    let gone = with(
        spec,
        "/linux/namespaces/1/path",
        json!("/proc/4194300/ns/pid"),
    );
    assert_eq!(
        status(agent.create("c3", &gone, Default::default()).await).0,
        Code::INTERNAL
    );
    agent.signal("pause", "", 9, false).await.expect("killed");
    agent.wait("pause", "").await.expect("waited");
    agent.delete("pause", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn further_processes_are_as_restricted_as_they_should_be() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["sleep", "1000"]);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c1").await.expect("started");
    let script = "id -u; pwd; grep CapEff /proc/self/status; ls -1 /proc/self/fd | wc -l; cat /proc/self/cgroup | grep ^0";
    let process = json!({"args": ["sh", "-c", script], "cwd": "/tmp", "env": ["PATH=/bin"], "user": {"uid": 1000, "gid": 1000}});
    let (tokens, [_stdin, stdout, _stderr]) = agent.streams().await;
    let pid = agent
        .exec("c1", "e1", &process, tokens)
        .await
        .expect("executed");
    let out = common::read_all(stdout).await;
    assert!(
        out.starts_with("1000\n/tmp\nCapEff:\t0000000000000000\n4\n"),
        "{out}"
    );
    assert_eq!(agent.wait("c1", "e1").await.expect("waited").exit_status, 0);
    assert!(pid > 0);
    let process = json!({"args": ["sh", "-c", "ulimit -S -n"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let (tokens, [_stdin, stdout, _stderr]) = agent.streams().await;
    agent
        .exec("c1", "e2", &process, tokens)
        .await
        .expect("executed");
    assert_eq!(
        common::read_all(stdout).await,
        "1024\n",
        "not the agent's own limits"
    );
    agent.signal("c1", "", 9, true).await.expect("killed");
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn scheduling_and_personality_are_set_for_all_processes() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let script = "uname -m; grep -E '^Cpus_allowed_list' /proc/self/status; cut -d' ' -f40,41 /proc/self/stat; cat";
    let spec = agent.spec("c1", &["sh", "-c", script]);
    for applet in ["uname", "cut", "ionice"] {
        std::os::unix::fs::symlink("busybox", agent.path().join("c1/bin").join(applet))
            .expect("a link");
    }
    let spec = with(spec, "/linux/personality", json!({"domain": "LINUX32"}));
    let scheduler = json!({"policy": "SCHED_BATCH", "nice": 5});
    let spec = with(spec, "/process/scheduler", scheduler.clone());
    let io = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    let spec = with(spec, "/process/ioPriority", io.clone());
    let (tokens, [stdin, stdout, stderr]) = agent.streams().await;
    agent.create("c1", &spec, tokens).await.expect("created");
    agent.start_container("c1").await.expect("started");
    let process = json!({"args": ["sh", "-c", format!("{script}; ionice")], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        "scheduler": scheduler, "ioPriority": io, "execCPUAffinity": {"initial": "0", "final": "0"}});
    let (tokens, [exec_stdin, exec_stdout, _exec_stderr]) = agent.streams().await;
    agent
        .exec("c1", "e1", &process, tokens)
        .await
        .expect("executed");
    drop(exec_stdin);
    let out = read_all(exec_stdout).await;
    assert!(out.starts_with("i686\nCpus_allowed_list:\t0\n"), "{out}");
    // rt_priority 0, SCHED_BATCH; then ionice's words.
    assert!(out.contains("\n0 3\n") && out.ends_with("idle\n"), "{out}");
    drop(stdin);
    let (out, err) = (read_all(stdout).await, read_all(stderr).await);
    assert!(
        out.starts_with("i686\n") && out.contains("\n0 3\n"),
        "{out}{err}"
    );
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
}

#[tokio::test]
async fn hooks_of_the_container_run_inside_before_its_program() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let hook = |script: &str| json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 20}]});
    let spec = agent.spec("c1", &["cat", "/tmp/state"]);
    let spec = with(
        spec,
        "/hooks",
        hook("cat > /tmp/state; hostname >> /tmp/state"),
    );
    // A process made ahead doesn't know the container's id, which hooks are told.
    agent.prepare().await.expect("prepared");
    agent.identify(&[7; 16]).await.expect("identified");
    let (exit, out, err) = agent.run("c1", &spec).await;
    assert_eq!(exit, 0, "{err}");
    assert!(
        out.contains(r#""id":"c1""#) && out.contains(r#""pid":1"#),
        "{out}"
    );
    assert!(out.ends_with("}inside\n"), "{out}");

    let failing = with(spec, "/hooks", hook("echo no >&2; exit 1"));
    agent
        .create("c2", &failing, Default::default())
        .await
        .expect("created");
    let (code, message) = status(agent.start_container("c2").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(
        message.contains("startContainer hook #0") && message.contains("no"),
        "{message}"
    );
    agent.wait("c2", "").await.expect("it is stopped");
    agent.delete("c2", "").await.expect("deleted");
}
