//! Standard input, output and error: pipes, which programs can reopen through /dev/stdout (they
//! can't with sockets), and the tasks that connect them to the host's streams.

use crate::error::{Context, Failure};
use crate::streams::{HostStreams, copy_input, copy_output};
use crate::transport::{Endpoint, EndpointKind};
use rustix::pipe::PipeFlags;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use tokio::task::AbortHandle;

/// The process's ends; `None` is /dev/null.
#[derive(Debug, Default)]
pub struct ProcessEnds {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl ProcessEnds {
    /// As descriptor numbers 0, 1 and 2 will refer to them.
    pub fn raw(&self, null: RawFd) -> [RawFd; 3] {
        [&self.stdin, &self.stdout, &self.stderr]
            .map(|end| end.as_ref().map_or(null, AsRawFd::as_raw_fd))
    }
}

impl ProcessEnds {
    /// The same, to be sent to another process.
    pub fn borrow<'a>(&'a self, null: BorrowedFd<'a>) -> [BorrowedFd<'a>; 3] {
        [&self.stdin, &self.stdout, &self.stderr].map(|end| end.as_ref().map_or(null, AsFd::as_fd))
    }
}

/// The agent's ends of the pipes.
#[derive(Debug, Default)]
pub struct AgentEnds {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Makes a pipe for each stream that the host gave; none for a terminal, which is made later.
pub fn make(
    host: &HostStreams,
    terminal: bool,
    uid: u32,
) -> Result<(ProcessEnds, AgentEnds), Failure> {
    let mut process = ProcessEnds::default();
    let mut agent = AgentEnds::default();
    if terminal {
        return Ok((process, agent));
    }
    if host.stdin.is_some() {
        let (read, write) = pipe(uid)?;
        (process.stdin, agent.stdin) = (Some(read), Some(nonblocking(write)?));
    }
    for (given, of_process, of_agent) in [
        (&host.stdout, &mut process.stdout, &mut agent.stdout),
        (&host.stderr, &mut process.stderr, &mut agent.stderr),
    ] {
        if given.is_some() {
            let (read, write) = pipe(uid)?;
            (*of_process, *of_agent) = (Some(write), Some(nonblocking(read)?));
        }
    }
    Ok((process, agent))
}

fn pipe(uid: u32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let action = || "make a pipe for a process's standard streams";
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).context(action)?;
    if uid != 0 {
        // So that its user can open /dev/stdout; both ends are one inode.
        rustix::fs::fchown(&read, Some(rustix::fs::Uid::from_raw(uid)), None).context(action)?;
    }
    Ok((read, write))
}

/// Only the agent's end: the flag belongs to the open file, which the other end doesn't share.
fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, Failure> {
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::NONBLOCK)
        .context(|| "make a pipe non-blocking")?;
    Ok(fd)
}

/// The tasks that copy a process's streams.
#[derive(Debug, Default)]
pub struct Copiers {
    input: Option<AbortHandle>,
    outputs: Vec<AbortHandle>,
    terminal: Option<Arc<Endpoint>>,
}

impl Copiers {
    /// Starts copying between the host's streams and a process's pipes, or its terminal's master.
    pub fn start(
        host: HostStreams,
        agent: AgentEnds,
        master: Option<OwnedFd>,
    ) -> Result<Self, Failure> {
        let mut copiers = Self::default();
        if let Some(master) = master {
            let master = Arc::new(endpoint(nonblocking(master)?, EndpointKind::Terminal)?);
            copiers.terminal = Some(Arc::clone(&master));
            copiers.input(host.stdin, Some(Arc::clone(&master)));
            // Without a reader the program would block, so its output is read in any case.
            copiers.output(host.stdout, Some(master));
            return Ok(copiers);
        }
        let pipe = |fd: Option<OwnedFd>| {
            fd.map(|fd| endpoint(fd, EndpointKind::Stream).map(Arc::new))
                .transpose()
        };
        copiers.input(host.stdin, pipe(agent.stdin)?);
        copiers.output(host.stdout, pipe(agent.stdout)?);
        copiers.output(host.stderr, pipe(agent.stderr)?);
        Ok(copiers)
    }

    fn input(&mut self, host: Option<Endpoint>, process: Option<Arc<Endpoint>>) {
        if let (Some(host), Some(process)) = (host, process) {
            self.input = Some(tokio::spawn(copy_input(host, process)).abort_handle());
        }
    }

    fn output(&mut self, host: Option<Endpoint>, process: Option<Arc<Endpoint>>) {
        if let Some(process) = process {
            let task = tokio::spawn(copy_output(process, host));
            self.outputs.push(task.abort_handle());
        }
    }

    /// The terminal's master, if there is a terminal.
    pub fn terminal(&self) -> Option<impl AsFd + use<>> {
        self.terminal.clone()
    }

    /// The process has exited: no one reads its input any more. What it wrote is still copied.
    pub fn end_input(&self) {
        if let Some(input) = &self.input {
            input.abort();
        }
    }

    /// Ends all copying, whatever is left.
    pub fn end(&self) {
        self.end_input();
        for output in &self.outputs {
            output.abort();
        }
    }
}

fn endpoint(fd: OwnedFd, kind: EndpointKind) -> Result<Endpoint, Failure> {
    Endpoint::new(fd, kind).context(|| "watch a process's standard streams")
}
