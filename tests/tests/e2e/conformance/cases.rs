//! What the spec's sections demand, as containers that look at themselves.

use super::runner::Places;
use serde_json::{Value, json};

/// One container.
pub struct Case {
    /// A word.
    pub name: &'static str,
    /// Of the OCI runtime spec 1.2.
    pub section: &'static str,
    /// Makes the configuration from that of a plain container.
    pub change: fn(&mut Value, &Places),
    /// Run by a shell in the container; prints lines `what=value`.
    pub script: &'static str,
    /// The values that the spec demands.
    pub expected: &'static [(&'static str, &'static str)],
}

fn mounts(spec: &mut Value) -> &mut Vec<Value> {
    spec["mounts"].as_array_mut().expect("an array")
}

fn namespaces(spec: &mut Value) -> &mut Vec<Value> {
    spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("an array")
}

fn no_change(_: &mut Value, _: &Places) {}

fn hook(places: &Places, name: &str) -> Value {
    // The state that each gets must name the container's bundle and status (runtime.md#state).
    let script = format!(
        "status=$(sed 's/.*\"status\" *: *\"\\([a-z]*\\)\".*/\\1/'); echo {name}:$status >>{}",
        places.hooks.display()
    );
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 60}])
}

pub const ALL: &[Case] = &[
    Case {
        name: "process",
        section: "config.md#process",
        change: |spec, _| {
            spec["process"]["cwd"] = "/tmp".into();
            spec["process"]["env"] = json!(["PATH=/bin", "COLOUR=deep blue"]);
            spec["process"]["user"] =
                json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o027});
            spec["process"]["rlimits"] = json!([
                {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            ]);
            spec["process"]["oomScoreAdj"] = 321.into();
        },
        script: "echo cwd=$PWD; echo env=$COLOUR; echo uid=$(id -u); echo gid=$(id -g); \
            echo groups=$(id -G); echo umask=$(umask); echo soft=$(ulimit -Sn); \
            echo hard=$(ulimit -Hn); echo core=$(ulimit -c); \
            echo oom=$(cat /proc/self/oom_score_adj); echo pid=$$; \
            echo session=$(cut -d' ' -f6 /proc/self/stat); exit 42",
        expected: &[
            ("cwd", "/tmp"),
            ("env", "deep blue"),
            ("uid", "1000"),
            ("gid", "1001"),
            ("groups", "1001 5 6"),
            ("umask", "0027"),
            ("soft", "100"),
            ("hard", "200"),
            ("core", "0"),
            ("oom", "321"),
            ("pid", "1"),
            ("session", "1"),
            ("exit status", "42"),
        ],
    },
    Case {
        name: "capabilities",
        section: "config.md#linux-process",
        change: |spec, _| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            spec["process"]["capabilities"] = json!({
                "bounding": ["CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_CHOWN"],
                "permitted": ["CAP_NET_BIND_SERVICE", "CAP_KILL"],
                "effective": ["CAP_NET_BIND_SERVICE"],
                "inheritable": ["CAP_NET_BIND_SERVICE", "CAP_KILL"],
                "ambient": ["CAP_NET_BIND_SERVICE"],
            });
            spec["process"]["noNewPrivileges"] = true.into();
        },
        script: "status() { sed -n \"s/^$1:[[:space:]]*0*//p\" /proc/self/status; }; \
            echo bounding=$(status CapBnd); echo inheritable=$(status CapInh); \
            echo ambient=$(status CapAmb); echo effective=$(status CapEff); \
            echo permitted=$(status CapPrm); echo nnp=$(status NoNewPrivs | wc -c)",
        expected: &[
            // CHOWN 0, KILL 5, NET_BIND_SERVICE 10. After an exec as another user, permitted and
            // effective are the ambient ones (capabilities(7)).
            ("bounding", "421"),
            ("inheritable", "420"),
            ("ambient", "400"),
            ("effective", "400"),
            ("permitted", "400"),
            ("nnp", "2"),
        ],
    },
    Case {
        name: "privileges",
        section: "config.md#linux-process",
        change: |spec, _| spec["process"]["noNewPrivileges"] = false.into(),
        script: "echo nnp=$(sed -n 's/^NoNewPrivs:[[:space:]]*//p' /proc/self/status)",
        expected: &[("nnp", "0")],
    },
    Case {
        name: "names",
        section: "config.md#hostname and #domainname",
        change: |spec, _| {
            spec["hostname"] = "harbour".into();
            spec["domainname"] = "example.net".into();
        },
        script: "echo hostname=$(hostname); \
            echo domainname=$(cat /proc/sys/kernel/domainname)",
        expected: &[("hostname", "harbour"), ("domainname", "example.net")],
    },
    Case {
        name: "root",
        section: "config.md#root",
        change: |spec, _| spec["root"]["readonly"] = true.into(),
        script: "touch /x 2>/dev/null && echo write=done || echo write=refused; \
            touch /dev/x && echo dev=writable; \
            echo root=$(awk '$5 == \"/\" {print $6}' /proc/self/mountinfo | cut -d, -f1)",
        expected: &[("write", "refused"), ("dev", "writable"), ("root", "ro")],
    },
    Case {
        name: "mounts",
        section: "config.md#mounts",
        change: |spec, places| {
            let volume = &places.volume;
            std::fs::create_dir(volume.join("inner")).expect("a folder");
            std::fs::write(volume.join("file"), "shared\n").expect("a file");
            mounts(spec).extend([
                json!({"destination": "/rw", "type": "bind", "source": volume, "options": ["rbind", "rw"]}),
                json!({"destination": "/ro", "type": "bind", "source": volume, "options": ["bind", "ro", "nosuid", "nodev", "noexec"]}),
                json!({"destination": "/deep/er/file", "type": "bind", "source": volume.join("file"), "options": ["bind"]}),
                json!({"destination": "/small", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=1750", "noexec"]}),
                json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid"]}),
                json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}),
            ]);
        },
        script: "options() { grep \" $1 \" /proc/self/mountinfo | cut -d' ' -f6 | tail -n 1; }; \
            echo seen=$(cat /rw/file); touch /rw/new && echo rw=done; \
            touch /ro/x 2>/dev/null || echo ro=refused; \
            for o in nosuid nodev noexec; do options /ro | grep -q $o && echo $o=set; done; \
            echo file=$(cat /deep/er/file); \
            dd if=/dev/zero of=/small/x bs=1k count=100 2>/dev/null || echo size=limited; \
            echo mode=$(stat -c %a /small); \
            echo mqueue=$(grep -c ' /dev/mqueue .* mqueue ' /proc/self/mountinfo); \
            touch /sys/fs/cgroup/x 2>/dev/null || echo cgroup=refused",
        expected: &[
            ("seen", "shared"),
            ("rw", "done"),
            ("ro", "refused"),
            ("nosuid", "set"),
            ("nodev", "set"),
            ("noexec", "set"),
            ("file", "shared"),
            ("size", "limited"),
            ("mode", "1750"),
            ("mqueue", "1"),
            ("cgroup", "refused"),
        ],
    },
    Case {
        name: "links",
        section: "config.md#mounts (a destination is resolved within the root)",
        change: |spec, places| {
            // Relative and absolute ways out, in the container's own root file system.
            let link = std::os::unix::fs::symlink;
            link("/../../../..", places.rootfs.join("out")).expect("a link");
            link("../../../../../tmp", places.rootfs.join("up")).expect("a link");
            for destination in ["/out/etc/in1", "/up/in2", "/tmp/../../../in3"] {
                mounts(spec).push(json!({
                    "destination": destination, "type": "tmpfs", "source": "tmpfs",
                    "options": ["size=64k"],
                }));
            }
        },
        script: "mounted() { grep -c \" $1 .* tmpfs \" /proc/self/mountinfo; }; \
            echo one=$(mounted /etc/in1); echo two=$(mounted /tmp/in2); echo three=$(mounted /in3)",
        expected: &[("one", "1"), ("two", "1"), ("three", "1")],
    },
    Case {
        name: "paths",
        section: "config-linux.md#masked-paths and #readonly-paths",
        change: |spec, places| {
            let etc = places.rootfs.join("etc");
            std::fs::write(etc.join("secret"), "secret").expect("a file");
            std::fs::create_dir(etc.join("vault")).expect("a folder");
            std::fs::write(etc.join("vault/gold"), "gold").expect("a file");
            std::fs::create_dir(etc.join("fixed")).expect("a folder");
            spec["linux"]["maskedPaths"] = json!(["/etc/secret", "/etc/vault", "/nowhere"]);
            spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/etc/fixed", "/nowhere"]);
        },
        script: "echo file=$(cat /etc/secret | wc -c | tr -d ' '); \
            echo folder=$(ls /etc/vault | wc -l | tr -d ' '); \
            (echo 1 >/proc/sys/vm/drop_caches) 2>/dev/null || echo sys=refused; \
            touch /etc/fixed/x 2>/dev/null || echo fixed=refused; \
            touch /etc/free && echo beside=written",
        expected: &[
            ("file", "0"),
            ("folder", "0"),
            ("sys", "refused"),
            ("fixed", "refused"),
            ("beside", "written"),
        ],
    },
    Case {
        name: "dev",
        section: "config-linux.md#default-devices",
        change: no_change,
        script: "for d in null zero full random urandom tty; do \
            echo $d=$(stat -c '%F %t:%T %a' /dev/$d); done; \
            for l in fd stdin stdout stderr ptmx; do echo $l=$(readlink /dev/$l); done; \
            echo nothing=$(cat /dev/null | wc -c | tr -d ' '); echo x >/dev/full 2>/dev/null || echo full-write=refused",
        expected: &[
            ("null", "character special file 1:3 666"),
            ("zero", "character special file 1:5 666"),
            ("full", "character special file 1:7 666"),
            ("random", "character special file 1:8 666"),
            ("urandom", "character special file 1:9 666"),
            ("tty", "character special file 5:0 666"),
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
            ("ptmx", "pts/ptmx"),
            ("nothing", "0"),
            ("full-write", "refused"),
        ],
    },
    Case {
        name: "devices",
        section: "config-linux.md#devices and #allowed-device-list",
        change: |spec, _| {
            spec["linux"]["devices"] = json!([
                {"path": "/dev/void", "type": "c", "major": 1, "minor": 3, "fileMode": 0o642, "uid": 7, "gid": 8},
                {"path": "/dev/sub/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666},
                {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
            ]);
            spec["linux"]["resources"] = json!({"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"},
            ]});
            for set in ["bounding", "effective", "permitted"] {
                let set = spec["process"]["capabilities"][set].as_array_mut();
                set.expect("an array").push("CAP_MKNOD".into());
            }
        },
        script: "echo void=$(stat -c '%F %t:%T %a %u:%g' /dev/void); \
            echo pipe=$(stat -c '%F' /dev/pipe); echo hi >/dev/void && echo allowed=done; \
            (: </dev/sub/fuse) 2>/dev/null && echo denied=opened || echo denied=refused; \
            mknod /tmp/node c 1 5 2>/dev/null && echo mknod=done || echo mknod=refused",
        expected: &[
            ("void", "character special file 1:3 642 7:8"),
            ("pipe", "fifo"),
            ("allowed", "done"),
            ("denied", "refused"),
            ("mknod", "refused"),
        ],
    },
    Case {
        name: "namespaces",
        section: "config-linux.md#namespaces",
        change: |spec, _| namespaces(spec).push(json!({"type": "cgroup"})),
        script: "ls /proc >/tmp/all; echo processes=$(grep -c '^[0-9]*$' /tmp/all); \
            echo interfaces=$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort | head -n 1); \
            echo cgroup=$(tail -n 1 /proc/self/cgroup | cut -d: -f3)",
        // This shell and ls.
        expected: &[("processes", "2"), ("interfaces", "lo"), ("cgroup", "/")],
    },
    Case {
        name: "users",
        section: "config-linux.md#user-namespace-mappings",
        change: |spec, places| {
            namespaces(spec).push(json!({"type": "user"}));
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 5000}]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
            // The root's files are the host root's: readable is enough here.
            let folder = places.volume.parent().expect("a parent");
            let mode =
                <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
            std::fs::set_permissions(folder, mode).expect("a mode");
        },
        script: "echo id=$(id -u); echo map=$(awk '{print $1, $2, $3}' /proc/self/uid_map); \
            echo gids=$(awk '{print $1, $2, $3}' /proc/self/gid_map); echo setgroups=$(cat /proc/self/setgroups)",
        expected: &[
            ("id", "0"),
            ("map", "0 100000 5000"),
            ("gids", "0 100000 5000"),
            ("setgroups", "allow"),
        ],
    },
    Case {
        name: "time",
        section: "config-linux.md#offset-for-time-namespace",
        change: |spec, _| {
            namespaces(spec).push(json!({"type": "time"}));
            spec["linux"]["timeOffsets"] = json!({
                "boottime": {"secs": 5_000_000, "nanosecs": 0},
                "monotonic": {"secs": 86_400, "nanosecs": 0},
            });
        },
        script: "echo up=$(($(cut -d. -f1 /proc/uptime) / 1000000))",
        expected: &[("up", "5")],
    },
    Case {
        name: "sysctl",
        section: "config-linux.md#sysctl",
        change: |spec, _| {
            spec["linux"]["sysctl"] = json!({
                "net.ipv4.ip_forward": "1",
                "kernel.msgmax": "4096",
                "fs.mqueue.msg_max": "20",
            });
        },
        script: "echo forward=$(cat /proc/sys/net/ipv4/ip_forward); \
            echo msgmax=$(cat /proc/sys/kernel/msgmax); \
            echo mqueue=$(cat /proc/sys/fs/mqueue/msg_max)",
        expected: &[("forward", "1"), ("msgmax", "4096"), ("mqueue", "20")],
    },
    Case {
        name: "seccomp",
        section: "config-linux.md#seccomp",
        change: |spec, _| {
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [
                    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                    {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"},
                    {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
                     "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
                ],
            });
        },
        script: "echo filters=$(sed -n 's/^Seccomp:[[:space:]]*//p' /proc/self/status); \
            echo mkdir=$(mkdir /tmp/x 2>&1 | sed 's/.*: //'); \
            echo default=$(hostname x 2>&1 | sed 's/.*: //'); \
            echo value=$(linux32 true 2>&1 | sed 's/.*: //'); \
            linux64 true && echo other=done",
        expected: &[
            ("filters", "2"),
            ("mkdir", "No space left on device"),
            ("default", "Operation not permitted"),
            ("value", "Function not implemented"),
            ("other", "done"),
        ],
    },
    Case {
        name: "personality",
        section: "config-linux.md#personality",
        change: |spec, _| spec["linux"]["personality"] = json!({"domain": "LINUX32"}),
        script: "echo machine=$(uname -m)",
        expected: &[("machine", "i686")],
    },
    Case {
        name: "propagation",
        section: "config-linux.md#rootfs-mount-propagation",
        change: |spec, _| spec["linux"]["rootfsPropagation"] = "shared".into(),
        script: "echo root=$(awk '$5 == \"/\" {print $7}' /proc/self/mountinfo | cut -d: -f1); \
            echo ran=yes",
        expected: &[("root", "shared"), ("ran", "yes")],
    },
    Case {
        name: "hooks",
        section: "config.md#posix-platform-hooks",
        change: |spec, places| {
            let start = "echo startContainer >/tmp/started";
            spec["hooks"] = json!({
                "prestart": hook(places, "prestart"),
                "createRuntime": hook(places, "createRuntime"),
                "createContainer": hook(places, "createContainer"),
                "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", start]}],
                "poststart": hook(places, "poststart"),
                "poststop": hook(places, "poststop"),
            });
        },
        script: "echo inside=$(cat /tmp/started); sleep 1",
        expected: &[
            ("inside", "startContainer"),
            (
                "hooks",
                "prestart:creating createRuntime:creating createContainer:creating \
                 poststart:running poststop:stopped",
            ),
        ],
    },
    Case {
        name: "failing-hook",
        section: "runtime.md#lifecycle (a failing createRuntime hook ends the container)",
        change: |spec, places| {
            let failing = json!([{"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}]);
            spec["hooks"] = json!({"createRuntime": failing, "poststop": hook(places, "poststop")});
        },
        script: "echo ran=yes",
        expected: &[("run", "refused")],
    },
    Case {
        name: "no-program",
        section: "runtime.md#start (a program that isn't there is an error)",
        change: |spec, _| spec["process"]["args"] = json!(["/no/such/program"]),
        script: "",
        expected: &[("run", "refused")],
    },
    Case {
        name: "no-namespace",
        section: "config-linux.md#namespaces (a path that is none of this type is an error)",
        change: |spec, _| {
            for namespace in namespaces(spec) {
                if namespace["type"] == "ipc" {
                    namespace["path"] = "/proc/self/ns/uts".into();
                }
            }
        },
        script: "",
        expected: &[("run", "refused")],
    },
    Case {
        name: "no-limit",
        section: "config.md#posix-process (an unknown or repeated limit is an error)",
        change: |spec, _| {
            spec["process"]["rlimits"] = json!([{"type": "RLIMIT_WHALES", "soft": 1, "hard": 1}]);
        },
        script: "",
        expected: &[("run", "refused")],
    },
    Case {
        name: "no-setting",
        section: "config-linux.md#sysctl (one that can't be set is an error)",
        change: |spec, _| spec["linux"]["sysctl"] = json!({"net.no.such": "1"}),
        script: "",
        expected: &[("run", "refused")],
    },
    Case {
        name: "killed",
        section: "runtime.md#kill",
        change: no_change,
        script: "echo before=here; kill -9 $$; sh -c 'kill -TERM $$'; exit $?",
        // A pid namespace's first process takes no signal from within that it has no handler for;
        // its child does.
        expected: &[("before", "here"), ("exit status", "143")],
    },
];
