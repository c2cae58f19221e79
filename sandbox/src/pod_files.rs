//! What the containers of a pod find in /etc and at /dev/shm. Where a daemon drives a pod by the
//! Task API it makes these files itself and binds them into each container; by the sandbox API
//! they are the runtime's to provide.

use crate::error::Error;
use crate::folder::{FolderError, RuntimeFolder};
use crate::mounts::mount_shm;
use crate::pod::PodSandbox;
use oci_spec::runtime::{Mount, MountBuilder, Spec};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where containers look, and the name in the pod's folder.
const FILES: [(&str, &str); 3] = [
    ("/etc/hostname", "hostname"),
    ("/etc/hosts", "hosts"),
    ("/etc/resolv.conf", "resolv.conf"),
];
const SHM: (&str, &str) = ("/dev/shm", "shm");

/// Largest file of the host's that is copied.
const MAX_COPY: u64 = 1 << 20;

/// A file or folder of the pod's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFile {
    /// Where containers find it.
    pub destination: &'static str,
    /// Where it is on the host.
    pub source: PathBuf,
}

/// The files of the pod with this folder.
pub(crate) fn list(folder: &RuntimeFolder) -> Vec<PodFile> {
    let place = folder.pod();
    let file = |(destination, name): (&'static str, &str)| PodFile {
        destination,
        source: place.join(name),
    };
    FILES.into_iter().chain([SHM]).map(file).collect()
}

/// Makes them. What is left after a failure goes with the folder.
pub(crate) fn make(folder: &RuntimeFolder, pod: &PodSandbox) -> Result<(), Error> {
    let place = folder.pod();
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |cause| FolderError::Io {
            verb: "make",
            path,
            cause,
        }
    };
    // 0755: unprivileged users of a container read what is in it, through the share alone.
    DirBuilder::new()
        .mode(0o755)
        .create(&place)
        .map_err(fail(&place))?;
    let texts = [
        hostname(pod).map(String::into_bytes),
        copy_of("/etc/hosts"),
        resolv_conf(pod),
    ];
    for ((_, name), text) in FILES.into_iter().zip(texts) {
        let path = place.join(name);
        let written = text.and_then(|text| write(&path, &text));
        written.map_err(fail(&path))?;
    }
    let shm = place.join(SHM.1);
    fs::create_dir(&shm).map_err(fail(&shm))?;
    mount_shm(&shm)?;
    Ok(())
}

/// Gives `spec` those of the pod's files that it doesn't bring itself. A /dev/shm of the
/// container's own is replaced where it shares the pod's IPC.
pub(crate) fn add(spec: &mut Spec, files: &[PodFile], shares_ipc: bool) {
    let readonly = spec
        .root()
        .as_ref()
        .is_some_and(|root| root.readonly() == Some(true));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for file in files {
        let is_shm = file.destination == SHM.0;
        if is_shm && !shares_ipc {
            continue;
        }
        let Some(bind) = bind(file, readonly && !is_shm) else {
            continue;
        };
        let at = |mount: &Mount| mount.destination() == Path::new(file.destination);
        match mounts.iter_mut().find(|mount| at(mount)) {
            None => mounts.push(bind),
            Some(own) if is_shm && own.typ().as_deref() == Some("tmpfs") => *own = bind,
            Some(_) => {}
        }
    }
    spec.set_mounts(Some(mounts));
}

fn bind(file: &PodFile, readonly: bool) -> Option<Mount> {
    let access = if readonly { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", access].map(String::from);
    MountBuilder::default()
        .destination(file.destination)
        .typ("bind")
        .source(file.source.clone())
        .options(options)
        .build()
        .ok()
}

/// The host's own name for a pod without one, which is a pod in the host's network.
fn hostname(pod: &PodSandbox) -> io::Result<String> {
    let name = match pod.hostname.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => name.to_owned(),
        None => nix::unistd::gethostname()?.to_string_lossy().into_owned(),
    };
    Ok(name + "\n")
}

/// resolv.conf(5) of what the pod asks for; of a pod that asks for nothing, the host's.
fn resolv_conf(pod: &PodSandbox) -> io::Result<Vec<u8>> {
    let dns = &pod.dns;
    if dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty() {
        return copy_of("/etc/resolv.conf");
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    Ok(text.into_bytes())
}

/// A file of the host's; empty if there is none.
fn copy_of(path: &str) -> io::Result<Vec<u8>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Ok(found) if found.len() > MAX_COPY => {
            let problem = format!("{path} has {} bytes; {MAX_COPY} are allowed", found.len());
            return Err(io::Error::other(problem));
        }
        _ => {}
    }
    fs::read(path)
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.write_all(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Dns;
    use serde_json::json;

    fn files() -> Vec<PodFile> {
        list(&RuntimeFolder::at("/run/x".into()))
    }

    fn spec(mounts: serde_json::Value, readonly: bool) -> Spec {
        let root = json!({ "path": "rootfs", "readonly": readonly });
        serde_json::from_value(json!({ "ociVersion": "1.0.2", "root": root, "mounts": mounts }))
            .unwrap()
    }

    fn sources(spec: &Spec) -> Vec<(String, String, String)> {
        let text = |path: &Path| path.display().to_string();
        let mounts = spec.mounts().iter().flatten();
        mounts
            .map(|mount| {
                let source = mount.source().as_deref().map(text).unwrap_or_default();
                let options = mount.options().clone().unwrap_or_default().join(",");
                (text(mount.destination()), source, options)
            })
            .collect()
    }

    #[test]
    fn a_container_gets_what_it_does_not_bring() {
        let mut spec = spec(
            json!([
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
                { "destination": "/etc/hosts", "type": "bind", "source": "/own", "options": ["rbind"] },
            ]),
            true,
        );
        add(&mut spec, &files(), true);
        let found = sources(&spec);
        let of = |destination: &str| {
            let all: Vec<_> = found.iter().filter(|one| one.0 == destination).collect();
            assert_eq!(all.len(), 1, "{destination} in {found:?}");
            (all[0].1.as_str(), all[0].2.as_str())
        };
        assert_eq!(of("/dev/shm"), ("/run/x/pod/shm", "rbind,rprivate,rw"));
        assert_eq!(of("/etc/hosts"), ("/own", "rbind"));
        assert_eq!(of("/etc/hostname").1, "rbind,rprivate,ro");
        assert_eq!(of("/etc/resolv.conf").0, "/run/x/pod/resolv.conf");
    }

    #[test]
    fn a_container_with_an_ipc_of_its_own_keeps_its_shm() {
        let own = json!([{ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" }]);
        let mut spec = spec(own, false);
        add(&mut spec, &files(), false);
        assert_eq!(sources(&spec)[0].1, "shm");
    }

    #[test]
    fn the_resolver_is_the_pods_or_the_hosts() {
        let pod = PodSandbox {
            dns: Dns {
                servers: vec!["192.0.2.1".into(), "192.0.2.2".into()],
                searches: vec!["a.example".into(), "b.example".into()],
                options: vec!["ndots:2".into()],
            },
            ..Default::default()
        };
        let text = String::from_utf8(resolv_conf(&pod).unwrap()).unwrap();
        assert_eq!(
            text,
            "search a.example b.example\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:2\n"
        );
        let hosts = resolv_conf(&PodSandbox::default()).unwrap();
        assert_eq!(hosts, copy_of("/etc/resolv.conf").unwrap());
        assert_eq!(copy_of("/no/such/file").unwrap(), b"");
    }
}
