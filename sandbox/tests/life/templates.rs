//! Templates as callers see them: made once, cloned from then on, and never the reason for a
//! refused start. VMM and agent are doubles.

use crate::common::{self, Pod, possible, process};
use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::pod::PodLimits;
use bulkhead_sandbox::sizing;
use bulkhead_sandbox::template::{self, Entry, Store};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How the VMs were started so far, and forgets it.
fn starts(pod: &Pod) -> Vec<String> {
    let path = pod.dir.path().join("starts");
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let _ = std::fs::remove_file(path);
    text.lines().map(str::to_owned).collect()
}

fn tell(pod: &Pod, name: &str) {
    std::fs::write(pod.dir.path().join(name), "").unwrap();
}

fn untell(pod: &Pod, name: &str) {
    std::fs::remove_file(pod.dir.path().join(name)).unwrap();
}

fn entries(pod: &Pod) -> Vec<Entry> {
    let folder = pod.templates.as_ref().unwrap();
    let store = Store::existing(folder).unwrap();
    store.map_or(Vec::new(), |store| store.list().unwrap())
}

/// All names in the store but lock files'.
fn names(pod: &Pod) -> Vec<String> {
    let folder = std::fs::read_dir(pod.templates.as_ref().unwrap()).unwrap();
    let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.ends_with(".lock")).collect()
}

/// Runs a container from create to delete, which starts a VM and ends it.
async fn run(pod: &Pod) {
    pod.run("c1", &["exit", "3"]).await;
    assert_eq!(pod.sandbox.wait(process("c1")).await.unwrap().code, 3);
    pod.sandbox.delete(process("c1")).await.unwrap();
    pod.assert_nothing_left().await;
}

/// The machine of a pod without limits.
fn size_of(config: &Config) -> sizing::MachineSize {
    let host = sizing::host_memory().unwrap();
    sizing::machine_size(config, PodLimits::default(), host).unwrap()
}

#[tokio::test]
async fn the_first_start_builds_and_every_start_clones_with_its_own_identity() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    run(&pod).await;
    assert_eq!(starts(&pod), ["boot", "clone"]);
    let calls = pod.agent.calls();
    assert_eq!(calls[..3], ["prepare", "identify ", "create c1 exit"]);
    run(&pod).await;
    run(&pod).await;
    assert_eq!(starts(&pod), ["clone", "clone"]);
    let all = entries(&pod);
    assert_eq!((all.len(), all[0].uses), (1, 3));
    let description = all[0].description.as_ref().unwrap();
    assert_eq!(description.identity.shape.memory_mib, 128);
    assert!(description.identity.is_current());
    assert_eq!(names(&pod), [all[0].key.to_string()]);
    let mut generations = pod.agent.generations();
    generations.sort();
    generations.dedup();
    assert_eq!(generations.len(), 3);
}

#[tokio::test]
async fn a_clone_gets_its_pods_host_name() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    let request = pod.request_with(
        "c1",
        serde_json::json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "hostname": "web-1",
            "process": {"cwd": "/", "args": ["sleep"], "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "uts"}]},
        }),
    );
    pod.sandbox.create(request).await.unwrap();
    assert!(pod.agent.calls().contains(&"identify web-1".to_owned()));
    pod.sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn first_starts_at_once_build_one_template() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    let second = pod.sibling();
    let (one, two) = tokio::join!(
        pod.sandbox.create(pod.request("c1", &["sleep"])),
        second.create(pod.request("c2", &["sleep"])),
    );
    one.unwrap();
    two.unwrap();
    assert_eq!(starts(&pod), ["boot", "clone", "clone"]);
    assert_eq!((entries(&pod).len(), entries(&pod)[0].uses), (1, 2));
    pod.sandbox.stop().await.unwrap();
    second.stop().await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn two_versions_share_a_folder_without_seeing_each_others_templates() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    let other = pod.dir.path().join("vmm-of-another-version");
    std::fs::copy(pod.config().vmm, &other).unwrap();
    let run_other = async || {
        let sandbox = pod.sibling();
        let mut request = pod.request("c1", &["sleep"]);
        let mut config = pod.config();
        config.vmm = other.clone();
        request.config = config.into();
        sandbox.create(request).await.unwrap();
        sandbox.stop().await.unwrap();
    };
    run(&pod).await;
    run_other().await;
    assert_eq!(starts(&pod), ["boot", "clone", "boot", "clone"]);
    run(&pod).await;
    run_other().await;
    assert_eq!(starts(&pod), ["clone", "clone"]);
    assert!(entries(&pod).iter().all(|entry| entry.uses == 2));
    assert_eq!(entries(&pod).len(), 2);
    // A new version in the old one's place is another one too.
    std::fs::remove_file(&other).unwrap();
    std::fs::copy(pod.config().vmm, &other).unwrap();
    run_other().await;
    assert_eq!(starts(&pod), ["boot", "clone"]);
    let current = |entry: &Entry| {
        let description = entry.description.as_ref();
        description.is_some_and(|description| description.identity.is_current())
    };
    assert_eq!(
        entries(&pod).iter().filter(|entry| current(entry)).count(),
        2
    );
}

#[tokio::test]
async fn the_folders_limit_is_kept() {
    if !possible() {
        return;
    }
    // The doubles' templates take some blocks each; ballast makes one of them large.
    let pod = Pod::new("ready").await.with_templates();
    run(&pod).await;
    let first = entries(&pod)[0].key.clone();
    let memory = pod
        .templates
        .as_ref()
        .unwrap()
        .join(first.as_str())
        .join("memory");
    std::fs::write(memory, vec![1; 65 << 20]).unwrap();
    let build = async |memory_mib| {
        let mut config = pod.config();
        config.template_limit_mib = 64;
        let size = sizing::MachineSize {
            vcpus: 1,
            memory_mib,
            hotplug_mib: 0,
        };
        template::build(&config, size, &|_| ()).await.unwrap().key
    };
    let second = build(192).await;
    assert_eq!(names(&pod), [second.to_string()]);
    let third = build(256).await;
    let mut left: Vec<_> = entries(&pod).into_iter().map(|entry| entry.key).collect();
    left.sort();
    let mut wanted = [second, third];
    wanted.sort();
    assert_eq!(left, wanted);
}

#[tokio::test]
async fn damaged_templates_are_rebuilt_and_the_container_runs() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    run(&pod).await;
    starts(&pod);
    let folder = pod
        .templates
        .as_ref()
        .unwrap()
        .join(entries(&pod)[0].key.as_str());
    type Damage<'a> = &'a dyn Fn(&Path);
    let damages: [(&str, Damage<'_>); 5] = [
        ("a flipped bit", &|path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[3] ^= 4;
            std::fs::write(path, bytes).unwrap();
        }),
        ("truncated", &|path| {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.set_len(2).unwrap();
        }),
        ("longer", &|path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes.push(0);
            std::fs::write(path, bytes).unwrap();
        }),
        ("missing", &|path| std::fs::remove_file(path).unwrap()),
        ("a folder", &|path| {
            std::fs::remove_file(path).unwrap();
            std::fs::create_dir(path).unwrap();
        }),
    ];
    for file in ["memory", "state"] {
        for (name, damage) in damages {
            damage(&folder.join(file));
            run(&pod).await;
            assert_eq!(starts(&pod), ["boot", "clone"], "{file} is {name}");
            run(&pod).await;
            assert_eq!(starts(&pod), ["clone"], "after {file} was {name}");
        }
    }
}

#[tokio::test]
async fn a_template_may_go_while_clones_run() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    pod.run("c1", &["sleep"]).await;
    let folder = pod.templates.clone().unwrap();
    let store = Store::existing(&folder).unwrap().unwrap();
    assert!(store.remove(&entries(&pod)[0].key).unwrap());
    pod.add_exec("c1", "e1", &["exit", "5"]).await;
    let exec = common::exec("c1", "e1");
    pod.sandbox.start(exec.clone()).await.unwrap();
    assert_eq!(pod.sandbox.wait(exec).await.unwrap().code, 5);
    pod.sandbox.stop().await.unwrap();
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0);
}

#[tokio::test]
async fn what_cannot_be_built_boots_cold_and_is_not_tried_at_each_start() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    tell(&pod, "no-save");
    run(&pod).await;
    assert_eq!(starts(&pod), ["boot", "boot"]);
    run(&pod).await;
    assert_eq!(starts(&pod), ["boot"]);
    assert!(entries(&pod).is_empty());
    let left = names(&pod);
    assert!(left.len() == 1 && left[0].ends_with(".failed"), "{left:?}");
    // An administrator who asks for it isn't put off.
    untell(&pod, "no-save");
    let size = size_of(&pod.config());
    let built = template::build(&pod.config(), size, &|_| ()).await.unwrap();
    assert_eq!(names(&pod), [built.key.to_string()]);
    starts(&pod);
    run(&pod).await;
    assert_eq!(starts(&pod), ["clone"]);
}

#[tokio::test]
async fn clones_that_come_to_nothing_are_replaced_by_a_boot() {
    if !possible() {
        return;
    }
    // What the double is told, and how three VMs in a row start then: of a template that was good
    // at first, and of those that are built later.
    let pod = Pod::new("ready").await.with_templates();
    for name in ["refuse", "lost"] {
        tell(&pod, name);
        run(&pod).await;
        assert_eq!(starts(&pod), ["boot", "boot"], "{name}");
        run(&pod).await;
        assert_eq!(starts(&pod), ["boot"], "{name}");
        untell(&pod, name);
        std::fs::remove_dir_all(pod.templates.as_ref().unwrap()).unwrap();
    }
    run(&pod).await;
    starts(&pod);
    tell(&pod, "refuse");
    run(&pod).await;
    assert_eq!(
        starts(&pod),
        ["boot", "boot"],
        "rebuilt, refused again, cold"
    );
    untell(&pod, "refuse");
    std::fs::remove_dir_all(pod.templates.as_ref().unwrap()).unwrap();
    pod.agent.misidentifies.store(true, Ordering::Relaxed);
    run(&pod).await;
    assert_eq!(starts(&pod), ["boot", "clone", "boot"]);
    run(&pod).await;
    assert_eq!(starts(&pod), ["boot"]);
}

#[tokio::test]
async fn without_a_usable_folder_vms_boot() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await.with_templates();
    let file = pod.dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for folder in [
        file.clone(),
        file.join("below"),
        PathBuf::from("/proc/nowhere"),
    ] {
        pod.templates = Some(folder);
        run(&pod).await;
        assert_eq!(starts(&pod), ["boot"]);
    }
}

#[tokio::test]
async fn a_full_disk_boots_cold_and_leaves_nothing() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await.with_templates();
    let disk = pod.dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    // Room for folders and sockets, none for a page of data.
    let options = Some("size=4k,mode=0700");
    mount(
        Some("tmpfs"),
        &disk,
        Some("tmpfs"),
        MsFlags::empty(),
        options,
    )
    .unwrap();
    std::fs::write(disk.join("ballast"), [1; 4096]).unwrap();
    pod.templates = Some(disk.join("t"));
    pod.run("c1", &["exit", "3"]).await;
    assert_eq!(pod.sandbox.wait(process("c1")).await.unwrap().code, 3);
    pod.sandbox.delete(process("c1")).await.unwrap();
    let left = names(&pod);
    umount2(&disk, MntFlags::MNT_DETACH).unwrap();
    assert!(
        left.iter().all(|name| name.ends_with(".failed")),
        "{left:?}"
    );
    assert_eq!(starts(&pod).last().unwrap(), "boot");
    pod.assert_nothing_left().await;
}

/// Builds in a process of its own, for the test that kills it.
#[tokio::test]
async fn helper_process() {
    let Some(folder) = std::env::var_os("BULKHEAD_TEST_BUILD") else {
        return;
    };
    let text = std::fs::read_to_string(Path::new(&folder).join("config.toml")).unwrap();
    let config = Config::parse(&text, "test").unwrap();
    let size = size_of(&config);
    template::build(&config, size, &|_| ()).await.unwrap();
}

#[tokio::test]
async fn a_killed_builder_takes_its_vm_along_and_the_next_one_cleans_up() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await.with_templates();
    let (config, dir) = (pod.config(), pod.dir.path());
    let text = format!(
        "kernel = {:?}\nrootfs = {:?}\nvmm = {:?}\nruntime_dir = {:?}\ntemplate_dir = {:?}\n\
         kernel_params = {:?}\n",
        config.kernel,
        config.rootfs,
        config.vmm,
        config.runtime_dir,
        config.template_dir,
        config.kernel_params
    );
    std::fs::write(dir.join("config.toml"), text).unwrap();
    tell(&pod, "saving");
    let mut builder = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "templates::helper_process", "--nocapture"])
        .env("BULKHEAD_TEST_BUILD", dir)
        .spawn()
        .unwrap();
    let vmm: i32 = loop {
        if let Ok(pid) = std::fs::read_to_string(dir.join("saving")).unwrap().parse() {
            break pid;
        }
        assert!(
            builder.try_wait().unwrap().is_none(),
            "the builder has ended"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    builder.kill().await.unwrap();
    // Waits as long as it takes; the test's runner has the last word.
    while nix::sys::signal::kill(nix::unistd::Pid::from_raw(vmm), None).is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let left = names(&pod);
    assert!(
        left.len() == 1 && left[0].starts_with("building-"),
        "{left:?}"
    );
    untell(&pod, "saving");
    starts(&pod);
    run(&pod).await;
    assert_eq!(starts(&pod), ["boot", "clone"]);
    assert_eq!(names(&pod), [entries(&pod)[0].key.to_string()]);
}
