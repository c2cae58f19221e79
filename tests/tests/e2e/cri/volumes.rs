//! A pod's volumes, laid out on the host as kubelet lays them out.

use super::{Pod, client::Client, own_network, pod_config, shell_container};
use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::runner::Checks;
use k8s_cri::v1::{ContainerConfig, Mount, MountPropagation};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Bytes of the volume in memory.
const MEMORY: u64 = 1 << 20;

/// The host's Perl, from a volume with the host's /usr, with [`LOCKS`]: busybox, as Debian builds it,
/// has no program for locks.
const PERL: &str = "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 \
    --library-path /usr/lib/x86_64-linux-gnu /usr/bin/perl /empty/locks.pl";

/// Tries to lock two files without waiting, one by flock(2), LOCK_EX and LOCK_NB, and one by fcntl(2),
/// F_SETLK with a struct flock of F_WRLCK, and prints for each the errno, or 0. With `hold` it must get
/// both, tells so by a file, and gives them up once something is written to a FIFO.
const LOCKS: &str = r#"
open(F, '>>', '/empty/flock') or die;
open(P, '>>', '/empty/posix') or die;
my $lock = pack('s s x4 q q i x4', 1, 0, 0, 0, 0);
my $flock = flock(F, 2 | 4) ? 0 : $! + 0;
my $posix = fcntl(P, 6, $lock) ? 0 : $! + 0;
print "$flock $posix";
exit if $ARGV[0] ne 'hold';
$flock || $posix and die;
open(H, '>', '/empty/held') && close(H) or die;
open(R, '<', '/tmp/release') or die;
<R>;
close(F); close(P); unlink('/empty/held');
sleep;
"#;

/// What container `one` does. Its first process has the locks, so that nothing else ends them.
fn holder() -> String {
    format!("mkfifo /tmp/release; exec {PERL} hold")
}

/// The pod's folders on the host. Dropping it takes its mounts away.
struct Volumes(PathBuf);

impl Volumes {
    fn new(folder: &Path) -> Self {
        let volumes = Self(folder.join("pod-volumes"));
        let made = ["host", "empty", "config", "subpath"].map(|name| volumes.path(name));
        made.iter()
            .for_each(|path| fs::create_dir_all(path).unwrap());
        let shared = MsFlags::MS_SHARED;
        tmpfs(&volumes.path("host"), "size=1m");
        mount(
            None::<&str>,
            &volumes.path("host"),
            None::<&str>,
            shared,
            None::<&str>,
        )
        .unwrap();
        fs::create_dir(volumes.path("host/later")).unwrap();
        fs::write(volumes.path("file"), "of the host\n").unwrap();
        fs::write(volumes.path("empty/sub"), "by subPath\n").unwrap();
        fs::write(volumes.path("empty/locks.pl"), LOCKS).unwrap();
        let memory = volumes.memory();
        fs::create_dir_all(&memory).unwrap();
        tmpfs(&memory, &format!("size={MEMORY}"));
        // As kubelet prepares a volume for fsGroup.
        std::os::unix::fs::chown(&memory, None, Some(2000)).unwrap();
        fs::set_permissions(&memory, PermissionsExt::from_mode(0o2777)).unwrap();
        volumes.write_config("1", "one");
        volumes
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn memory(&self) -> PathBuf {
        self.path("volumes/kubernetes.io~empty-dir/cache")
    }

    /// As kubelet's atomic writer does: a new folder, and `..data` swapped for a link to it.
    fn write_config(&self, generation: &str, value: &str) {
        let config = self.path("config");
        let folder = format!("..{generation}");
        fs::create_dir(config.join(&folder)).unwrap();
        fs::write(config.join(&folder).join("key"), value).unwrap();
        symlink(&folder, config.join("..data_tmp")).unwrap();
        fs::rename(config.join("..data_tmp"), config.join("..data")).unwrap();
        if fs::symlink_metadata(config.join("key")).is_err() {
            symlink("..data/key", config.join("key")).unwrap();
        }
    }

    fn container(&self, name: &str) -> ContainerConfig {
        let script = match name {
            "one" => holder(),
            _ => "exec sleep 100000".to_owned(),
        };
        let mut config = shell_container(name, &script);
        let volume = |from: &str, to: &str, readonly: bool| Mount {
            container_path: to.into(),
            host_path: self.path(from).display().to_string(),
            readonly,
            ..Default::default()
        };
        let mut follows = volume("host", "/follows", false);
        follows.set_propagation(MountPropagation::PropagationHostToContainer);
        config.mounts = vec![
            volume("host", "/host", false),
            follows,
            volume("file", "/etc/file", false),
            volume("empty", "/empty", false),
            volume("empty/sub", "/sub", true),
            volume("config", "/config", true),
            Mount {
                container_path: "/usr".into(),
                host_path: "/usr".into(),
                readonly: true,
                ..Default::default()
            },
            Mount {
                container_path: "/cache".into(),
                host_path: self.memory().display().to_string(),
                ..Default::default()
            },
        ];
        config
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        for path in [self.path("host/later"), self.path("host"), self.memory()] {
            let _ = umount2(&path, MntFlags::MNT_DETACH);
        }
    }
}

fn tmpfs(at: &Path, options: &str) {
    let (kind, none) = (Some("tmpfs"), MsFlags::empty());
    mount(kind, at, kind, none, Some(options)).unwrap();
}

/// A script that ends when `condition` holds, and fails if it doesn't within a minute.
fn until(condition: &str) -> String {
    format!("i=0; until {condition}; do i=$((i+1)); [ $i -lt 300 ] || exit 1; sleep 0.2; done")
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let Some((containerd, client)) = checks.require("containerd serves CRI", || {
        own_network();
        let release = Release::debian();
        let containerd = Containerd::start_with_cri(artifacts, &release, "").unwrap();
        let client = Client::with_images(&containerd);
        (containerd, client)
    }) else {
        return;
    };
    let volumes = Volumes::new(containerd.folder());
    let pods = Cgroup::make("pods").unwrap();
    let config = pod_config(&containerd, &pods, "volumes");
    let Some((pod, one, two)) = checks.require("a pod with two containers and volumes", || {
        let id = client.run_pod(&config);
        let id = id.unwrap_or_else(|error| panic!("{error}: {}", containerd.log_tail(12)));
        let (client, config) = (&client, config.clone());
        let pod = Pod { client, config, id };
        let [one, two] = ["one", "two"].map(|name| pod.run(&containerd, volumes.container(name)));
        (pod, one, two)
    }) else {
        return;
    };
    shared(checks, &client, &volumes, (&one, &two));
    met(checks, &client, (&one, &two));
    locks(checks, &client, (&one, &two));
    updated(checks, &client, &volumes, &one);
    propagation(checks, &client, &volumes, &one);
    refused(checks, &pod, &volumes);
    in_memory(checks, &containerd, &pod, &volumes, (&one, &two));
    pod.removed(checks);
}

fn shared(checks: &mut Checks, client: &Client, volumes: &Volumes, (one, two): (&str, &str)) {
    checks.check("folders and single files are shared both ways", || {
        let script = "cat /etc/file /sub; echo by the guest >>/etc/file; echo 1 >/empty/note; \
            chown 7:8 /empty/note; chmod 640 /empty/note";
        assert_eq!(client.shell(one, script), "of the host\nby subPath");
        let file = fs::read_to_string(volumes.path("file")).unwrap();
        assert_eq!(file, "of the host\nby the guest\n");
        let note = fs::metadata(volumes.path("empty/note")).unwrap();
        assert_eq!((note.uid(), note.gid(), note.mode() & 0o777), (7, 8, 0o640));
        fs::write(volumes.path("empty/new"), "made by the host\n").unwrap();
        assert_eq!(
            client.shell(two, "cat /empty/note /empty/new"),
            "1\nmade by the host"
        );
    });
    checks.check("a volume that is read-only is that", || {
        let script =
            "for f in /sub /config/key; do echo x >>$f; done 2>&1; touch /config/x 2>&1; true";
        let output = client.shell(one, script);
        assert_eq!(output.matches("Read-only").count(), 3, "{output}");
    });
}

/// One container serves, the other one comes to it, by way of a volume that both have.
fn met(checks: &mut Checks, client: &Client, (one, two): (&str, &str)) {
    checks.check("a socket in a volume connects two containers", || {
        let log = "ln -s /empty/log /dev/log";
        client.shell(one, &format!("{log}; syslogd -O /empty/messages"));
        client.shell(one, &until("[ -S /empty/log ]"));
        client.shell(two, &format!("{log}; logger from two"));
        client.shell(two, &until("grep -q 'from two' /empty/messages"));
        client.shell(one, "killall syslogd");
    });
    checks.check("a FIFO in a volume connects two containers", || {
        for volume in ["/empty", "/cache"] {
            // What waits for its reader holds no stream of its exec's, which would not end.
            let write = format!(
                "mkfifo -m 640 {volume}/pipe; \
                 {{ {{ seq 1 9000; echo end; }} >{volume}/pipe; }} </dev/null >/dev/null 2>&1 &"
            );
            client.shell(one, &write);
            let read = format!(
                "stat -c '%F %a' {volume}/pipe; tail -n 1 <{volume}/pipe; rm {volume}/pipe"
            );
            assert_eq!(client.shell(two, &read), "fifo 640\nend");
        }
    });
}

/// Locks that one container has are locks to the other one.
fn locks(checks: &mut Checks, client: &Client, (one, two): (&str, &str)) {
    let tried = || client.shell(two, &format!("exec {PERL} try"));
    let name = "a lock of flock(2) or fcntl(2) that one container has, the other one can't take";
    let held = checks.require(name, || {
        client.shell(two, &until("[ -e /empty/held ]"));
        let again = libc::EAGAIN;
        assert_eq!(tried(), format!("{again} {again}"));
    });
    if held.is_none() {
        return;
    }
    checks.check("it can once the lock was given up", || {
        client.shell(one, "echo >/tmp/release");
        client.shell(two, &until("[ ! -e /empty/held ]"));
        assert_eq!(tried(), "0 0");
    });
}

fn updated(checks: &mut Checks, client: &Client, volumes: &Volumes, one: &str) {
    checks.check("an update of a ConfigMap is seen", || {
        let before = client.shell(one, "cat /config/key; readlink /config/..data");
        assert_eq!(before, "one..1");
        volumes.write_config("2", "two");
        fs::remove_dir_all(volumes.path("config/..1")).unwrap();
        client.shell(one, &until("[ \"$(cat /config/key 2>/dev/null)\" = two ]"));
        assert_eq!(
            client.shell(one, "readlink /config/..data; ls -A /config"),
            "..2\n..2\n..data\nkey"
        );
    });
}

fn in_memory(
    checks: &mut Checks,
    containerd: &Containerd,
    pod: &Pod,
    volumes: &Volumes,
    (one, two): (&str, &str),
) {
    let client = pod.client;
    checks.check("a volume in memory is the guest's, with its size", || {
        let script = "stat -f -c '%T %b %S' /cache; stat -c '%a %g' /cache; echo kept >/cache/note; ls -n /cache/note";
        let output = client.shell(one, script);
        let lines: Vec<&str> = output.lines().collect();
        let blocks = MEMORY / 4096;
        assert_eq!(lines[..2], [&format!("tmpfs {blocks} 4096"), "2777 2000"], "{output}");
        assert!(lines[2].contains(" 2000 "), "{output}");
        assert_eq!(client.shell(two, "cat /cache/note"), "kept");
        assert_eq!(fs::read_dir(volumes.memory()).unwrap().count(), 0, "on the host");
        // Some of it is taken, by the note.
        let full = "head -c 2000000 /dev/zero 2>&1 >/cache/full; wc -c </cache/full; rm /cache/full";
        let output = client.shell(two, full);
        let written = output.lines().last().unwrap_or_default();
        assert_eq!(written.trim().parse(), Ok(MEMORY - 4096), "{output}");
    });
    checks.check("it outlives its containers", || {
        client.stop(one, 0).unwrap();
        client.remove(one).unwrap();
        client.stop(two, 0).unwrap();
        client.remove(two).unwrap();
        let mut config = volumes.container("one");
        config.metadata.get_or_insert_default().attempt = 1;
        let again = pod.run(containerd, config);
        assert_eq!(client.shell(&again, "cat /cache/note"), "kept");
    });
}

fn propagation(checks: &mut Checks, client: &Client, volumes: &Volumes, one: &str) {
    checks.check(
        "what the host mounts later shows up with HostToContainer only",
        || {
            assert_eq!(
                client.shell(one, "ls /host/later /follows/later"),
                "/follows/later:\n\n/host/later:"
            );
            let later = volumes.path("host/later");
            tmpfs(&later, "size=64k");
            fs::write(later.join("mounted"), "later\n").unwrap();
            client.shell(one, &until("[ -e /follows/later/mounted ]"));
            assert_eq!(
                client.shell(one, "cat /follows/later/mounted; ls /host/later"),
                "later"
            );
        },
    );
}

fn refused(checks: &mut Checks, pod: &Pod, volumes: &Volumes) {
    checks.check("Bidirectional is refused, and says why", || {
        let mut config = shell_container("bidirectional", "exec sleep 1");
        let mut volume = Mount {
            container_path: "/host".into(),
            host_path: volumes.path("host").display().to_string(),
            ..Default::default()
        };
        volume.set_propagation(MountPropagation::PropagationBidirectional);
        config.mounts = vec![volume];
        let id = pod.client.create(&pod.id, config, &pod.config).unwrap();
        let error = pod.client.start(&id).unwrap_err().to_string();
        assert!(
            error.contains("Bidirectional") && error.contains("HostToContainer"),
            "{error}"
        );
        pod.client.remove(&id).unwrap();
    });
}
