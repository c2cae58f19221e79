//! Which KVM this host has: from the VMM's own probe, else from flags and modules.

use bulkhead_proto::vmm::KvmKind;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long the probe may take; on a host that emulates guest kernel code it takes seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// Longest answer that is read.
const MAX_ANSWER: u64 = 64 * 1024;

/// Modules by which KVM comes.
const MODULES: [&str; 4] = ["kvm", "kvm_intel", "kvm_amd", "kvm_pvm"];

/// What `bulkhead-vmm --probe` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Probe {
    /// How guest kernel code runs.
    pub kvm: KvmKind,
    /// How fast.
    pub ring0_instructions_per_second: u64,
    /// KVM_GET_API_VERSION's answer.
    pub api_version: i32,
}

/// What is known of the host's KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kvm {
    /// How guest kernel code runs.
    pub kind: Option<KvmKind>,
    /// The loaded modules.
    pub modules: Vec<&'static str>,
    /// How fast guest kernel code runs.
    pub ring0_instructions_per_second: Option<u64>,
    /// KVM_GET_API_VERSION's answer.
    pub api_version: Option<i32>,
}

impl Kvm {
    /// Puts together what `probe` and the host's files say.
    pub fn find(probe: Option<&Probe>) -> Self {
        let loaded = |module: &&str| Path::new("/sys/module").join(module).exists();
        let modules: Vec<_> = MODULES.into_iter().filter(loaded).collect();
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kind = probe
            .map(|probe| probe.kvm)
            .or_else(|| guess(&cpuinfo, &modules));
        Self {
            kind,
            modules,
            ring0_instructions_per_second: probe.map(|probe| probe.ring0_instructions_per_second),
            api_version: probe.map(|probe| probe.api_version),
        }
    }
}

/// From the processor's flags and the modules alone.
fn guess(cpuinfo: &str, modules: &[&str]) -> Option<KvmKind> {
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    if modules.contains(&"kvm_pvm") {
        Some(KvmKind::Emulated)
    } else if has("vmx") {
        Some(KvmKind::Vmx)
    } else if has("svm") {
        Some(KvmKind::Svm)
    } else {
        None
    }
}

/// The kind in words for people.
pub(super) fn words(kind: KvmKind) -> &'static str {
    match kind {
        KvmKind::Vmx => "Intel VMX: guest kernels run natively",
        KvmKind::Svm => "AMD SVM: guest kernels run natively",
        KvmKind::Native => "guest kernels run natively",
        KvmKind::Emulated => {
            "a software module: containers' own code runs natively, guest kernel code is emulated, \
             so starting a container takes seconds"
        }
    }
}

/// Asks the VMM.
pub(super) fn probe(vmm: &Path) -> Result<Probe, String> {
    let failed =
        |cause: &dyn std::fmt::Display| format!("{} --probe failed: {cause}", vmm.display());
    let mut child = Command::new(vmm)
        .arg("--probe")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|cause| failed(&cause))?;
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait().map_err(|cause| failed(&cause))? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(&format!("no answer within {LIMIT:?}")));
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let text = |stream: Option<&mut dyn Read>| {
        let mut text = String::new();
        let _ = stream.map(|stream| stream.take(MAX_ANSWER).read_to_string(&mut text));
        text
    };
    if !status.success() {
        let stderr = text(child.stderr.as_mut().map(|stream| stream as &mut dyn Read));
        return Err(failed(&format!("{status}: {}", stderr.trim())));
    }
    let stdout = text(child.stdout.as_mut().map(|stream| stream as &mut dyn Read));
    serde_json::from_str(&stdout)
        .map_err(|cause| failed(&format!("its answer is unreadable: {cause}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(text: &str) -> tempfile::TempPath {
        let draft = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        std::fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o700)).unwrap();
        // Copied by another process: what this one has open for writing, a program that another
        // test is just starting may have too, and then it can't be executed (ETXTBSY).
        let file = tempfile::TempPath::try_from_path(draft.with_extension("sh")).unwrap();
        let copied = Command::new("cp").args([&draft, &file]).status().unwrap();
        assert!(copied.success());
        file
    }

    #[test]
    fn flags_and_modules_tell_the_kind() {
        let intel = "processor : 0\nflags\t\t: fpu vme vmx sse\n";
        assert_eq!(guess(intel, &["kvm"]), Some(KvmKind::Vmx));
        assert_eq!(guess("flags : svm", &[]), Some(KvmKind::Svm));
        assert_eq!(
            guess("flags : fpu", &["kvm", "kvm_pvm"]),
            Some(KvmKind::Emulated)
        );
        assert_eq!(guess("flags : vmxnet", &["kvm"]), None);
    }

    #[test]
    fn the_probes_answer_is_read() {
        let vmm = script(
            r#"echo '{"kvm":"emulated","ring0_instructions_per_second":400000,"api_version":12}'"#,
        );
        let wanted = Probe {
            kvm: KvmKind::Emulated,
            ring0_instructions_per_second: 400_000,
            api_version: 12,
        };
        assert_eq!(probe(&vmm), Ok(wanted));
    }

    #[test]
    fn a_failed_probe_says_why() {
        let error = probe(&script("echo cannot open /dev/kvm >&2; exit 1")).unwrap_err();
        assert!(error.contains("cannot open /dev/kvm"), "{error}");
        let error = probe(&script("echo nonsense")).unwrap_err();
        assert!(error.contains("unreadable"), "{error}");
    }
}
