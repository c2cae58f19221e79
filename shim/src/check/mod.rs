//! `bulkhead check`: can this host run microVMs, with which kind of KVM, and what to do if not.
//!
//! With `--json` it prints one object. Its keys are stable; later versions may add some:
//!
//! | key | value |
//! |---|---|
//! | `version` | this program's version |
//! | `ok` | whether every required check passed; the exit code is 0 then, else 1 |
//! | `kvm.kind` | `vmx`, `svm`, `native`, `emulated`, or null if there was no telling |
//! | `kvm.modules` | the loaded KVM modules |
//! | `kvm.ring0_instructions_per_second` | as the VMM's probe measured it, or null |
//! | `kvm.api_version` | KVM_GET_API_VERSION's answer, or null |
//! | `checks[].name` | `config`, `kvm_device`, `vmm`, `kvm_kind`, `guest_kernel`, `guest_rootfs`, `memory`, `templates`, `shim`, `containerd` |
//! | `checks[].ok` | whether it passed |
//! | `checks[].required` | whether containers can't run without it |
//! | `checks[].detail` | what was found |
//! | `checks[].advice` | what to do, or null |

mod kvm;

pub use kvm::{Kvm, Probe};

use bulkhead_sandbox::config::{Config, ConfigSource};
use bulkhead_sandbox::template::Store;
use bulkhead_sandbox::{images, sizing};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// See the module.
    pub name: &'static str,
    /// Whether it passed.
    pub ok: bool,
    /// Whether containers can't run without it.
    pub required: bool,
    /// What was found.
    pub detail: String,
    /// What to do.
    pub advice: Option<String>,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// This program's version.
    pub version: &'static str,
    /// Whether containers can run.
    pub ok: bool,
    /// The host's KVM.
    pub kvm: Kvm,
    /// Each thing that was looked at.
    pub checks: Vec<Check>,
}

impl Check {
    fn passed(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            ok: true,
            required: true,
            detail: detail.into(),
            advice: None,
        }
    }

    fn failed(name: &'static str, detail: impl Into<String>, advice: &str) -> Self {
        let advice = Some(advice.to_owned()).filter(|advice| !advice.is_empty());
        Self {
            name,
            ok: false,
            required: true,
            detail: detail.into(),
            advice,
        }
    }

    /// From a check of the sandbox library, whose errors say themselves what to do.
    fn from_result<T>(
        name: &'static str,
        good: String,
        result: Result<T, impl fmt::Display>,
    ) -> Self {
        match result {
            Ok(_) => Self::passed(name, good),
            Err(error) => Self::failed(name, error.to_string(), ""),
        }
    }

    fn optional(self) -> Self {
        Self {
            required: false,
            ..self
        }
    }
}

/// Looks at everything, with the configuration of `config` or the one that a shim would find.
pub fn run(config: Option<PathBuf>) -> Report {
    let mut checks = Vec::new();
    let found = Config::find(&ConfigSource {
        path: config,
        body: None,
    });
    let config = match found {
        Ok(config) => {
            checks.push(Check::passed("config", "valid"));
            config
        }
        Err(error) => {
            checks.push(Check::failed(
                "config",
                error.to_string(),
                "correct the file",
            ));
            Config::default()
        }
    };
    checks.push(Check::from_result(
        "kvm_device",
        format!("{} opens", images::KVM),
        images::open_kvm(),
    ));
    let vmm = images::check_vmm(&config.vmm);
    let probe = vmm.is_ok().then(|| kvm::probe(&config.vmm));
    checks.push(Check::from_result(
        "vmm",
        config.vmm.display().to_string(),
        vmm,
    ));
    let kvm = Kvm::find(probe.as_ref().and_then(|probe| probe.as_ref().ok()));
    checks.push(kind(&kvm, probe.and_then(Result::err)));
    let kernel = images::open_kernel(&config.kernel);
    checks.push(Check::from_result(
        "guest_kernel",
        config.kernel.display().to_string(),
        kernel,
    ));
    let rootfs = images::open_rootfs(&config.rootfs);
    checks.push(Check::from_result(
        "guest_rootfs",
        config.rootfs.display().to_string(),
        rootfs,
    ));
    checks.push(memory(&config));
    checks.push(templates(&config).optional());
    checks.push(shim().optional());
    checks.push(containerd().optional());
    let ok = checks.iter().all(|check| check.ok || !check.required);
    Report {
        version: crate::info::VERSION,
        ok,
        kvm,
        checks,
    }
}

fn kind(kvm: &Kvm, probe_failure: Option<String>) -> Check {
    const NAME: &str = "kvm_kind";
    if let Some(failure) = probe_failure {
        let advice = "run bulkhead-vmm --probe by hand, and look at the kernel's log";
        return Check::failed(NAME, failure, advice);
    }
    let modules = if kvm.modules.is_empty() {
        "no KVM module seen".to_owned()
    } else {
        format!("modules: {}", kvm.modules.join(", "))
    };
    match kvm.kind {
        None => {
            let advice =
                "enable virtualisation in the firmware, or nested virtualisation on the hypervisor";
            Check::failed(
                NAME,
                format!("no telling how guests run; {modules}"),
                advice,
            )
        }
        Some(kind) => {
            let speed = kvm.ring0_instructions_per_second;
            let speed = speed.map(|speed| format!(", {speed} guest kernel instructions a second"));
            let words = kvm::words(kind);
            Check::passed(
                NAME,
                format!("{words}; {modules}{}", speed.unwrap_or_default()),
            )
        }
    }
}

fn memory(config: &Config) -> Check {
    const MIB: u64 = 1024 * 1024;
    const NAME: &str = "memory";
    let none = bulkhead_sandbox::pod::PodLimits::default();
    let fits = sizing::host_memory()
        .and_then(|host| sizing::machine_size(config, none, host).map(|size| (host, size)));
    match fits {
        Ok((host, size)) => {
            let detail = format!("{} MiB; one VM takes {} MiB", host / MIB, size.memory_mib);
            Check::passed(NAME, detail)
        }
        Err(error) => Check::failed(NAME, error.to_string(), ""),
    }
}

/// Without templates every VM boots: slower, but it runs.
fn templates(config: &Config) -> Check {
    const NAME: &str = "templates";
    let path = config.template_dir.display();
    if !config.templates {
        let detail = "off in the configuration: every virtual machine boots";
        return Check::passed(NAME, detail);
    }
    let listed = Store::existing(&config.template_dir)
        .and_then(|store| store.map(|store| store.list()).transpose());
    match listed {
        Ok(Some(entries)) => {
            let mib = entries.iter().map(|entry| entry.bytes).sum::<u64>() >> 20;
            let (count, limit) = (entries.len(), config.template_limit_mib);
            let detail = format!("on; {count} in {path}, {mib} of {limit} MiB");
            Check::passed(NAME, detail)
        }
        Ok(None) => {
            let detail = format!("on; the first start makes {path}");
            Check::passed(NAME, detail)
        }
        Err(error) => Check::failed(NAME, error.to_string(), ""),
    }
}

fn shim() -> Check {
    const NAME: &str = "shim";
    const PROGRAM: &str = "containerd-shim-bulkhead-v2";
    match find_program(PROGRAM) {
        Some(path) => Check::passed(NAME, path.display().to_string()),
        None => Check::failed(
            NAME,
            format!("{PROGRAM} is not in $PATH"),
            "install it to a folder of containerd's $PATH, or name it to containerd by its absolute path",
        ),
    }
}

fn containerd() -> Check {
    const NAME: &str = "containerd";
    const SOCKET: &str = "/run/containerd/containerd.sock";
    let Some(path) = find_program("containerd") else {
        let advice = "apt-get install containerd (1.6 or later)";
        return Check::failed(NAME, "containerd is not in $PATH", advice);
    };
    let running = if Path::new(SOCKET).exists() {
        "its socket is there"
    } else {
        "not running"
    };
    Check::passed(NAME, format!("{}, {running}", path.display()))
}

fn find_program(name: &str) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
    };
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(executable)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let mark = match (check.ok, check.required) {
                (true, _) => "ok  ",
                (false, true) => "FAIL",
                (false, false) => "warn",
            };
            writeln!(f, "{mark}  {:<13} {}", check.name, check.detail)?;
            if let Some(advice) = &check.advice {
                writeln!(f, "      {:<13} -> {advice}", "")?;
            }
        }
        let verdict = if self.ok {
            "This host can run microVMs."
        } else {
            "This host cannot run microVMs yet."
        };
        writeln!(f, "{verdict}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_parts_fail_with_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.toml");
        let text = "kernel = \"/nonexistent/vmlinux\"\nrootfs = \"/nonexistent/root\"\nvmm = \"/nonexistent/vmm\"";
        std::fs::write(&path, text).unwrap();
        let report = run(Some(path));
        assert!(!report.ok);
        for (name, wanted) in [
            ("guest_kernel", "/nonexistent/vmlinux"),
            ("guest_rootfs", "/nonexistent/root"),
            ("vmm", "/nonexistent/vmm"),
        ] {
            let check = report
                .checks
                .iter()
                .find(|check| check.name == name)
                .unwrap();
            assert!(!check.ok && check.detail.contains(wanted), "{check:?}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["ok"], false);
        assert!(
            json["kvm"]
                .as_object()
                .unwrap()
                .contains_key("ring0_instructions_per_second")
        );
        assert!(report.to_string().contains("cannot run microVMs"));
    }

    #[test]
    fn templates_are_told_on_off_or_unusable_but_never_required() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            template_dir: dir.path().join("t"),
            ..Config::default()
        };
        let found = templates(&config);
        assert!(
            found.ok && found.detail.contains("the first start"),
            "{found:?}"
        );
        Store::open(&config.template_dir).unwrap();
        let found = templates(&config);
        assert!(
            found.ok && found.detail.contains("0 of 2048 MiB"),
            "{found:?}"
        );
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&config.template_dir, open).unwrap();
        let found = templates(&config);
        assert!(
            !found.ok && found.detail.contains("others may write"),
            "{found:?}"
        );
        config.templates = false;
        let found = templates(&config);
        assert!(found.ok && found.detail.contains("off"), "{found:?}");
    }

    #[test]
    fn a_broken_configuration_is_reported_not_fatal() {
        let report = run(Some("/nonexistent/bulkhead.toml".into()));
        let check = &report.checks[0];
        assert!(
            check.name == "config" && !check.ok && check.detail.contains("/nonexistent"),
            "{check:?}"
        );
    }
}
