//! The same containers under runc: a process that holds the pod's namespaces, and containers that
//! join them.

use super::{Figure, Values, expect_status};
use crate::start::runc;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::pod::member_spec;
use bulkhead_tests::shim::{Bundle, spec};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Stdio;
use std::time::Instant;

const POD: &str = "bench-runc-pod";

/// Longest that a killed process may take to end, in milliseconds.
const END: libc::c_int = 30_000;

/// A pod that runs. Dropping it removes its container by force.
pub struct Pod {
    sandbox: Bundle,
    member: Bundle,
}

impl Pod {
    /// Starts it.
    ///
    /// # Errors
    /// When runc fails.
    pub fn start(artifacts: &Artifacts) -> Result<Self> {
        let sandbox = Bundle::new(artifacts, POD, "")?;
        sandbox.set_spec(&spec(&["sleep", "1000000"]))?;
        runc::set_cgroup(&sandbox)?;
        let pod = Self {
            sandbox,
            member: Bundle::new(artifacts, "bench-runc-task", "")?,
        };
        create(&pod.sandbox)?;
        run(&pod.sandbox, &["start", pod.sandbox.id()])?;
        let pid = pid_of(&pod.sandbox)?;
        let member = &pod.member;
        member.set_spec(&member_spec(POD, pid, &["sleep", "1000000"]))?;
        runc::set_cgroup(member)?;
        Ok(pod)
    }

    /// One container's life on the clock.
    ///
    /// # Errors
    /// When runc fails.
    pub fn life(&self, values: &mut Values) -> Result<()> {
        let member = &self.member;
        let mut timed = |figure, step: &dyn Fn() -> Result<()>| -> Result<()> {
            let began = Instant::now();
            step()?;
            values.add(figure, began.elapsed().as_secs_f64() * 1000.0);
            Ok(())
        };
        timed(Figure::CreateMs, &|| create(member))?;
        timed(Figure::StartMs, &|| run(member, &["start", member.id()]))?;
        timed(Figure::ExecMs, &|| {
            run(member, &["exec", member.id(), "true"])
        })?;
        let process = open_process(pid_of(member)?)?;
        timed(Figure::KillMs, &|| {
            run(member, &["kill", member.id(), "KILL"])?;
            wait_for_end(&process)
        })?;
        timed(Figure::DeleteMs, &|| run(member, &["delete", member.id()]))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for bundle in [&self.member, &self.sandbox] {
            let _ = runc::runc(bundle)
                .args(["delete", "--force", bundle.id()])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

fn create(bundle: &Bundle) -> Result<()> {
    let path = bundle.path().display().to_string();
    let pid_file = bundle.beside("pid").display().to_string();
    let words = ["create", "--bundle", &path, "--pid-file", &pid_file];
    run(bundle, &[&words[..], &[bundle.id()]].concat())
}

fn run(bundle: &Bundle, arguments: &[&str]) -> Result<()> {
    let status = runc::runc(bundle)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context(|| format!("run {} {arguments:?}", runc::PROGRAM))?;
    let code = status.code().and_then(|code| u32::try_from(code).ok());
    expect_status(&format!("runc {arguments:?}"), code.unwrap_or(u32::MAX), 0)
}

fn pid_of(bundle: &Bundle) -> Result<u32> {
    let path = bundle.beside("pid");
    let text = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    text.trim()
        .parse()
        .map_err(|_| Error::Unexpected(format!("{} holds {text:?}", path.display())))
}

/// A descriptor that becomes readable when the process ends (pidfd_open(2)).
fn open_process(pid: u32) -> Result<File> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context(|| format!("open process {pid}"));
    }
    // SAFETY: the call has just returned this new descriptor.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

fn wait_for_end(process: &File) -> Result<()> {
    let mut polled = libc::pollfd {
        fd: process.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `polled` is one valid entry.
    match unsafe { libc::poll(&mut polled, 1, END) } {
        1 => Ok(()),
        0 => Err(Error::TimedOut {
            what: "the end of a killed container of runc's".into(),
            seconds: 30,
            detail: String::new(),
        }),
        _ => Err(std::io::Error::last_os_error()).context(|| "wait for a process's end".into()),
    }
}
