//! What a pod's security contexts ask for.

use super::{Pod, security, shell_container};
use bulkhead_tests::containerd::Containerd;
use bulkhead_tests::runner::Checks;
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{Capability, Int64Value, LinuxContainerSecurityContext, Mount, SecurityProfile};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// What kubelet makes of `fsGroup`.
const FS_GROUP: u32 = 2000;

/// Allows everything but to make folders.
const NO_FOLDERS: &str = r#"{ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42 }] }"#;

/// The value of a line of /proc/PID/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().last())
        .unwrap_or_default()
}

/// A container that may do little.
pub fn restricted(checks: &mut Checks, containerd: &Containerd, pod: &Pod) {
    let volume = containerd.folder().join("volume");
    let started = checks.require("a container with users, capabilities and a profile", || {
        // As kubelet prepares a volume for fsGroup.
        std::fs::create_dir(&volume).unwrap();
        std::os::unix::fs::chown(&volume, None, Some(FS_GROUP)).unwrap();
        std::fs::set_permissions(&volume, PermissionsExt::from_mode(0o2770)).unwrap();
        let profile = containerd.folder().join("no-folders.json");
        std::fs::write(&profile, NO_FOLDERS).unwrap();
        let mut config = shell_container("secured", "exec sleep 100000");
        *security(&mut config) = LinuxContainerSecurityContext {
            run_as_user: Some(Int64Value { value: 1000 }),
            run_as_group: Some(Int64Value { value: 1000 }),
            supplemental_groups: vec![FS_GROUP.into(), 3000],
            readonly_rootfs: true,
            no_new_privs: true,
            seccomp: Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: profile.display().to_string(),
            }),
            capabilities: Some(Capability {
                add_capabilities: vec!["SYS_TIME".into()],
                drop_capabilities: vec!["CHOWN".into()],
                ..Default::default()
            }),
            ..security(&mut config).clone()
        };
        config.mounts = vec![Mount {
            container_path: "/volume".into(),
            host_path: volume.display().to_string(),
            ..Default::default()
        }];
        pod.run(containerd, config)
    });
    let Some(id) = started else { return };
    checks.check("user, groups, capabilities, read-only root", || {
        let script = "id -u; id -g; id -G; touch /x 2>&1; cat /proc/self/status";
        let output = pod.client.shell(&id, script);
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines[..2], ["1000", "1000"], "{output}");
        for group in ["2000", "3000"] {
            assert!(lines[2].split(' ').any(|one| one == group), "{output}");
        }
        assert!(lines[3].contains("Read-only"), "{output}");
        let bounding = u64::from_str_radix(field(&output, "CapBnd"), 16).unwrap();
        assert_eq!((bounding & 1, bounding >> 25 & 1), (0, 1), "{bounding:x}");
        assert_eq!(field(&output, "NoNewPrivs"), "1");
    });
    checks.check("fsGroup: a volume's files are of its group", || {
        pod.client.shell(&id, "echo written >/volume/file");
        let file = std::fs::metadata(volume.join("file")).unwrap();
        assert_eq!((file.uid(), file.gid()), (1000, FS_GROUP));
    });
    checks.check("a Localhost seccomp profile filters as it says", || {
        let refused = pod.client.shell(&id, "mkdir /volume/folder 2>&1 || true");
        // Error 42 is ENOMSG, which nothing else would say here.
        assert!(refused.contains("No message of desired type"), "{refused}");
        assert!(!volume.join("folder").exists());
    });
}

/// A container that may do everything, inside of its machine.
pub fn privileged(checks: &mut Checks, containerd: &Containerd, pod: &Pod) {
    checks.check(
        "privileged: all of the machine, nothing of the host",
        || {
            let mut config = shell_container("privileged", "exec sleep 100000");
            let context = security(&mut config);
            (context.privileged, context.seccomp) = (true, None);
            let id = pod.run(containerd, config);
            let script = "mount -t tmpfs none /tmp && echo 1 >/proc/sys/net/ipv4/ip_forward && \
            cat /proc/sys/net/ipv4/ip_forward /proc/self/status; ls /dev";
            let output = pod.client.shell(&id, script);
            let lines: Vec<&str> = output.lines().collect();
            assert_eq!(lines[0], "1", "{output}");
            let effective = u64::from_str_radix(field(&output, "CapEff"), 16).unwrap();
            // CAP_SYS_ADMIN, CAP_SYS_MODULE, CAP_MKNOD.
            for capability in [21, 16, 27] {
                assert_eq!(effective >> capability & 1, 1, "{effective:x}");
            }
            assert_eq!(field(&output, "Seccomp:"), "0");
            assert!(lines.contains(&"null"), "{output}");
            let of_host = ["kvm", "vhost-vsock", "loop-control", "mem", "sda", "vda"];
            for name in of_host
                .into_iter()
                .filter(|name| Path::new("/dev").join(name).exists())
            {
                assert!(!lines.contains(&name), "{output}");
            }
        },
    );
}
