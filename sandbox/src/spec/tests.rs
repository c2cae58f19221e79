use super::*;
use oci_spec::runtime::LinuxNamespaceType;
use serde_json::{Value, json};

struct Bundle(tempfile::TempDir);

impl Bundle {
    fn new(spec: &Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        Self(dir)
    }
    fn load(&self) -> Result<BundleSpec, SpecError> {
        BundleSpec::load(self.0.path())
    }
}

fn minimal() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0},
                    "apparmorProfile": "docker-default"},
        "linux": {"namespaces": [{"type": "pid"}]},
    })
}

fn with(pointer: &str, value: Value) -> Value {
    let mut spec = minimal();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[key] = value;
    spec
}

fn id() -> ContainerId {
    ContainerId::try_from("c1").unwrap()
}

#[test]
fn the_guest_gets_its_own_root_and_no_host_labels_or_hooks() {
    let hooks = json!({
        "prestart": [{"path": "/bin/true"}],
        "startContainer": [{"path": "/bin/inside"}],
    });
    let spec = with("/hooks", hooks);
    let bundle = Bundle::new(&spec);
    let spec = bundle.load().unwrap();
    assert_eq!(spec.root_path(), bundle.0.path().join("rootfs"));
    assert!(spec.hooks().is_some());
    let guest = spec.for_guest(&id(), &PodSettings::default()).unwrap().spec;
    let root = guest.root().as_ref().unwrap().path();
    assert_eq!(root, Path::new("/run/bulkhead/shared/c1/rootfs"));
    // But for those whose programs are the container's own.
    let hooks = guest.hooks().as_ref().unwrap();
    assert_eq!(
        hooks.start_container().as_ref().unwrap()[0].path(),
        Path::new("/bin/inside")
    );
    assert!(hooks.prestart().is_none() && hooks.poststop().is_none());
    assert!(
        guest
            .process()
            .as_ref()
            .unwrap()
            .apparmor_profile()
            .is_none()
    );
}

#[test]
fn a_bad_spec_is_refused_with_the_fields_name() {
    for (spec, wanted) in [
        (with("/process/args", json!([])), "process.args"),
        (with("/process/args", json!(["sh", 5])), "process.args[1]"),
        (with("/process/args", json!([""])), "process.args[0]"),
        (with("/process/cwd", json!("tmp")), "process.cwd"),
        (with("/ociVersion", json!("2.0.0")), "ociVersion"),
        (with("/root", json!({"path": ""})), "root.path"),
        (with("/root", Value::Null), "root"),
        (with("/process", Value::Null), "process"),
    ] {
        let error = Bundle::new(&spec).load().unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
    let error = BundleSpec::load(Path::new("/nonexistent"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent/config.json"), "{error}");
}

#[test]
fn files_and_folders_are_bound_through_the_share() {
    let dir = tempfile::tempdir().unwrap();
    let (file, folder) = (dir.path().join("file"), dir.path().join("folder"));
    std::fs::write(&file, "x").unwrap();
    std::fs::create_dir(&folder).unwrap();
    let spec = with(
        "/mounts",
        json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/f", "type": "bind", "source": file, "options": ["bind", "ro"]},
            {"destination": "/null", "type": "bind", "source": "/dev/null", "options": ["bind"]},
            {"destination": "/d", "source": folder, "options": ["rbind", "rw"]},
            {"destination": "/d", "source": "none", "options": ["remount", "bind", "ro"]},
        ]),
    );
    let guest = Bundle::new(&spec)
        .load()
        .unwrap()
        .for_guest(&id(), &PodSettings::default())
        .unwrap();
    let wanted = [
        Bind {
            number: 0,
            source: file,
            is_dir: false,
            readonly: true,
            recursive: false,
            follows: true,
            ids: None,
            volume: None,
            upper: false,
        },
        Bind {
            number: 1,
            source: folder,
            is_dir: true,
            readonly: false,
            recursive: true,
            follows: true,
            ids: None,
            volume: None,
            upper: false,
        },
    ];
    assert_eq!(guest.binds, wanted);
    let sources: Vec<_> = guest
        .spec
        .mounts()
        .iter()
        .flatten()
        .map(|m| m.source().clone().unwrap())
        .collect();
    assert_eq!(
        sources,
        [
            "proc",
            "/run/bulkhead/shared/c1/mounts/0",
            "/dev/null",
            "/run/bulkhead/shared/c1/mounts/1",
            "none"
        ]
        .map(PathBuf::from)
    );
}

#[test]
fn ids_of_mounts_are_mapped_on_the_host() {
    let range = |container: u32, host: u32, size: u32| json!([{"containerID": container, "hostID": host, "size": size}]);
    let of = |mount: Value, own: Value| {
        let mut mount = mount;
        mount["destination"] = json!("/x");
        mount["source"] = json!("/tmp");
        let mut spec = with("/mounts", json!([mount]));
        spec["linux"]["uidMappings"] = own.clone();
        spec["linux"]["gidMappings"] = own;
        Bundle::new(&spec)
            .load()
            .unwrap()
            .for_guest(&id(), &PodSettings::default())
    };
    let none = || json!([]);
    // With maps of its own, as with none: then those of the container's user namespace.
    let maps = json!({"options": ["rbind", "ridmap", "ro"], "uidMappings": range(0, 7, 1), "gidMappings": range(0, 8, 1)});
    for (mount, own, wanted, recursive) in [
        (maps.clone(), none(), (7, 8), true),
        (
            json!({"options": ["bind", "idmap"]}),
            range(0, 9, 1),
            (9, 9),
            false,
        ),
    ] {
        let mut guest = of(mount, own).unwrap();
        let ids = guest.binds[0].ids.take().unwrap();
        assert_eq!((ids.uids[0].host_id(), ids.gids[0].host_id()), wanted);
        assert_eq!(ids.recursive, recursive);
        let mount = &guest.spec.mounts().as_ref().unwrap()[0];
        assert!(mount.uid_mappings().is_none() && mount.gid_mappings().is_none());
        let options = mount.options().as_ref().unwrap();
        assert!(
            !options.iter().any(|word| word.ends_with("idmap")),
            "{options:?}"
        );
    }
    for (mount, wanted) in [
        (
            json!({"options": ["bind", "idmap"]}),
            "mounts[0].uidMappings",
        ),
        (
            json!({"options": ["bind"], "uidMappings": range(0, 1, 1)}),
            "mounts[0].gidMappings",
        ),
        (
            json!({"options": ["bind"], "uidMappings": range(0, 1, 0), "gidMappings": range(0, 1, 1)}),
            "mounts[0].uidMappings",
        ),
        (
            json!({"options": ["bind"], "uidMappings": range(0, 1, 1), "gidMappings": range(u32::MAX, 1, 1)}),
            "mounts[0].gidMappings",
        ),
    ] {
        let error = of(mount, none()).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn what_cannot_be_shared_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (source, wanted) in [
        (json!(socket), "Unix socket"),
        (json!("/nonexistent/data"), "/nonexistent/data"),
        (json!("/dev/kmsg"), "device of the host"),
        (json!(""), "is missing"),
    ] {
        let spec = with(
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": source}]),
        );
        let error = Bundle::new(&spec)
            .load()
            .unwrap()
            .for_guest(&id(), &PodSettings::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(wanted) && error.contains("mounts[0].source"),
            "{error}"
        );
    }
}

#[test]
fn mounts_that_would_reach_the_host_are_refused() {
    let of = |word: &str| {
        let mount = json!({"destination": "/x", "source": "/tmp", "options": ["rbind", word]});
        let spec = with("/mounts", json!([mount]));
        let spec = Bundle::new(&spec).load().unwrap();
        spec.for_guest(&id(), &PodSettings::default())
    };
    for word in ["shared", "rshared"] {
        let error = of(word).unwrap_err();
        assert_eq!(error.kind(), Kind::Unimplemented);
        let text = error.to_string();
        assert!(
            text.contains("mounts[0].options") && text.contains("rslave"),
            "{text}"
        );
    }
    for (word, follows) in [("rslave", true), ("ro", true), ("rprivate", false)] {
        assert_eq!(of(word).unwrap().binds[0].follows, follows, "{word}");
    }
}

fn pod() -> PodSettings {
    PodSettings {
        hostname: Some("web-0".into()),
        sysctls: [("net.ipv4.tcp_syncookies".to_owned(), "0".to_owned())].into(),
        files: Vec::new(),
    }
}

#[test]
fn a_container_joins_the_processes_of_its_pod_and_of_no_other() {
    let mut spec = with(
        "/linux/namespaces",
        json!([{"type": "mount"}, {"type": "pid", "path": "/proc/77/ns/pid"}]),
    );
    let lone = Bundle::new(&spec).load().unwrap();
    let error = lone.for_guest(&id(), &pod()).unwrap_err();
    assert_eq!(error.kind(), Kind::Unimplemented);
    spec["annotations"] = json!({"io.kubernetes.cri.container-type": "container"});
    let guest = Bundle::new(&spec).load().unwrap();
    let guest = guest.for_guest(&id(), &pod()).unwrap().spec;
    let linux = guest.linux().as_ref().unwrap();
    let namespaces = linux.namespaces().as_ref().unwrap();
    let kinds: Vec<_> = namespaces.iter().map(|one| one.typ()).collect();
    assert_eq!(kinds, [LinuxNamespaceType::Mount, LinuxNamespaceType::Pid]);
    let path = namespaces[1].path().as_deref();
    assert_eq!(
        path,
        Some(Path::new(bulkhead_proto::guest::POD_PID_NAMESPACE))
    );
    spec["linux"]["namespaces"][1]["path"] = json!("/run/pid-namespace");
    let elsewhere = Bundle::new(&spec).load().unwrap();
    assert!(elsewhere.for_guest(&id(), &pod()).is_err());
}

#[test]
fn a_pods_user_namespace_is_joined_by_its_ids() {
    let user = json!({"type": "user", "path": "/proc/77/ns/user"});
    let maps = json!([{"containerID": 0, "hostID": 524_288, "size": 65_536}]);
    let mut spec = with("/linux/namespaces", json!([{"type": "mount"}, user]));
    spec["annotations"] = json!({"io.kubernetes.cri.container-type": "container"});
    let for_guest = |spec: &Value| {
        let bundle = Bundle::new(spec);
        bundle.load().unwrap().for_guest(&id(), &pod())
    };
    let error = for_guest(&spec).unwrap_err();
    assert!(error.to_string().contains("linux.uidMappings"), "{error}");
    spec["linux"]["uidMappings"] = maps.clone();
    spec["linux"]["gidMappings"] = maps;
    let guest = for_guest(&spec).unwrap().spec;
    let linux = guest.linux().as_ref().unwrap();
    let joined = &linux.namespaces().as_ref().unwrap()[1];
    assert_eq!(joined.typ(), LinuxNamespaceType::User);
    assert_eq!(joined.path(), &None);
    assert_eq!(linux.uid_mappings().as_ref().unwrap()[0].host_id(), 524_288);
    // Not together with processes of others.
    let pids = json!({"type": "pid", "path": "/proc/77/ns/pid"});
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(pids);
    let error = for_guest(&spec).unwrap_err();
    assert_eq!(error.kind(), Kind::Unimplemented);
    assert!(error.to_string().contains("hostUsers"), "{error}");
}

#[test]
fn a_pods_kernel_parameters_are_set_with_each_container() {
    let spec = with("/linux/sysctl", json!({"kernel.shmmax": "4096"}));
    let spec = Bundle::new(&spec).load().unwrap();
    assert_eq!(spec.pod_settings().sysctls["kernel.shmmax"], "4096");
    let guest = spec.for_guest(&id(), &pod()).unwrap().spec;
    let sysctls = guest.linux().as_ref().unwrap().sysctl().clone().unwrap();
    assert_eq!(sysctls["kernel.shmmax"], "4096");
    assert_eq!(sysctls["net.ipv4.tcp_syncookies"], "0");
}

#[test]
fn a_limit_of_swap_holds_where_there_is_none() {
    let resources = json!({"memory": {"limit": 4096, "swap": 4096}});
    let spec = with("/linux/resources", resources);
    let spec = Bundle::new(&spec).load().unwrap();
    let guest = spec.for_guest(&id(), &pod()).unwrap().spec;
    let resources = guest.linux().as_ref().unwrap().resources().clone().unwrap();
    let memory = resources.memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(4096), None));
}

#[test]
fn a_pods_namespaces_become_the_guests() {
    let spec = with(
        "/linux/namespaces",
        json!([
            {"type": "pid"}, {"type": "mount"},
            {"type": "network", "path": "/var/run/netns/cni-1"},
            {"type": "ipc", "path": "/proc/77/ns/ipc"},
            {"type": "uts", "path": "/proc/77/ns/uts"},
        ]),
    );
    let spec = Bundle::new(&spec).load().unwrap();
    assert_eq!(
        spec.host_netns().unwrap(),
        HostNetns::Path("/var/run/netns/cni-1".into())
    );
    let guest = spec.for_guest(&id(), &pod()).unwrap().spec;
    assert_eq!(guest.hostname().as_deref(), Some("web-0"));
    let namespaces = guest
        .linux()
        .as_ref()
        .unwrap()
        .namespaces()
        .as_ref()
        .unwrap();
    let kinds: Vec<_> = namespaces.iter().map(|one| one.typ()).collect();
    assert_eq!(
        kinds,
        [
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Uts
        ]
    );
    assert!(namespaces.iter().all(|one| one.path().is_none()));
}

#[test]
fn host_namespaces_that_cannot_be_joined_are_refused() {
    let spec = with(
        "/linux/namespaces",
        json!([{"type": "pid", "path": "/proc/1/ns/pid"}]),
    );
    let spec = Bundle::new(&spec).load().unwrap();
    let error = spec.for_guest(&id(), &PodSettings::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Unimplemented);
    assert!(
        error.to_string().contains("linux.namespaces[0].path"),
        "{error}"
    );
}

#[test]
fn the_task_lives_in_the_specs_host_network_namespace() {
    let of = |namespaces| {
        let spec = with("/linux/namespaces", namespaces);
        Bundle::new(&spec).load().unwrap().host_netns()
    };
    let new = of(json!([{"type": "network"}]));
    assert_eq!(new.unwrap(), HostNetns::New);
    let hosts = json!([{"type": "network", "path": "/proc/self/ns/net"}]);
    for (namespaces, wanted) in [
        (json!([{"type": "pid"}]), "no network namespace is listed"),
        (hosts, "/proc/self/ns/net is the host's own"),
    ] {
        let error = of(namespaces).unwrap_err();
        assert_eq!(error.kind(), Kind::Unimplemented);
        let error = error.to_string();
        assert!(
            error.contains(wanted) && error.contains("another runtime"),
            "{error}"
        );
    }
}

#[test]
fn a_container_with_a_vm_of_its_own_has_the_guests_own_network() {
    let kinds = |annotations| {
        let mut spec = with(
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "network"}]),
        );
        spec["annotations"] = annotations;
        let guest = Bundle::new(&spec).load().unwrap();
        let guest = guest.for_guest(&id(), &pod()).unwrap().spec;
        let namespaces = guest.linux().as_ref().unwrap().namespaces().clone();
        let kinds = namespaces.unwrap().into_iter().map(|one| one.typ());
        kinds.collect::<Vec<_>>()
    };
    assert_eq!(kinds(json!({})), [LinuxNamespaceType::Mount]);
    let shared = kinds(json!({"io.containerd.runc.v2.group": "another"}));
    assert_eq!(shared.len(), 2, "{shared:?}");
}

#[test]
fn limits_size_the_machine() {
    let spec = with(
        "/linux/resources",
        json!({"memory": {"limit": 1048576}, "cpu": {"quota": 5, "period": 10}}),
    );
    let limits = Bundle::new(&spec).load().unwrap().limits();
    assert_eq!(
        limits,
        PodLimits {
            cpu_quota: Some(5),
            cpu_period: Some(10),
            memory: Some(1048576)
        }
    );
}

#[test]
fn an_execs_process_is_checked_too() {
    let good = json!({"cwd": "/", "args": ["ls"], "user": {"uid": 0, "gid": 0}});
    let process = parse_process(good.to_string().as_bytes(), true).unwrap();
    assert_eq!(process.terminal(), Some(true));
    let error = parse_process(br#"{"cwd":"/","user":{"uid":0,"gid":0},"args":[]}"#, false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("process.args"), "{error}");
    let error = parse_process(br#"{"cwd":"/","args":7}"#, false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("invalid at args"), "{error}");
}

#[test]
fn containers_of_a_pod_have_their_folders_in_common() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().display().to_string();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let volume = |kind: &str, options: Value| {
        let mut spec = minimal();
        spec["annotations"] = json!({"io.kubernetes.cri.container-type": kind});
        spec["mounts"] = json!([
            {"destination": "/a", "type": "bind", "source": source, "options": options},
            {"destination": "/b", "type": "bind", "source": file, "options": ["bind"]},
        ]);
        let loaded = Bundle::new(&spec).load().unwrap();
        let guest = loaded.for_guest(&id(), &PodSettings::default()).unwrap();
        assert_eq!(guest.binds[1].volume, None, "a file is not shared");
        let place = guest.spec.mounts().as_ref().unwrap()[0].source().clone();
        (guest.binds[0].volume.clone(), place.unwrap())
    };
    let (one, place) = volume("container", json!(["rbind", "rw"]));
    assert_eq!(volume("container", json!(["rbind", "rw"])).0, one);
    assert!(
        place.ends_with(format!("@volumes/mounts/{}", one.clone().unwrap())),
        "{place:?}"
    );
    // What is mounted below later is a later container's, too: by another bind, unless the first one
    // shows it by itself.
    if nix::unistd::geteuid().is_root() {
        let below = dir.path().join("below");
        std::fs::create_dir(&below).unwrap();
        let private = json!(["rbind", "rprivate"]);
        let before = volume("container", private.clone()).0;
        let (kind, none) = (Some("tmpfs"), nix::mount::MsFlags::empty());
        nix::mount::mount(kind, &below, kind, none, None::<&str>).unwrap();
        let (after, follows) = (
            volume("container", private.clone()).0,
            volume("container", json!(["rbind", "rw"])).0,
        );
        nix::mount::umount(&below).unwrap();
        assert_ne!(after, before);
        assert_eq!(follows, one);
        assert_eq!(volume("container", private).0, before);
    }
    // Who may write, and who may not, have not the same.
    assert_ne!(volume("container", json!(["rbind", "ro"])).0, one);
    assert_eq!(
        volume("", json!(["rbind", "rw"])).0,
        None,
        "a lone container"
    );
}
