//! The set-up process: everything between the clone and the exec.
//!
//! It is a copy of the agent, so it touches as little memory as it can, keeps none of the agent's
//! descriptors, and never returns.

use super::control::{await_start, send};
use super::plan::ProcessPlan;
use super::report::Report;
use super::scheduling::Personality;
use super::terminal::{self, WindowSize};
use super::{executable, identity, sysctls};
use crate::error::{Context, Failure, Kind};
use crate::rootfs::Sources;
use crate::seccomp::Filter;
use crate::spares::Taken;
use crate::spec::ContainerPlan;
use crate::syscalls::{Linux, last_error};
use crate::users;
use rustix::process::DumpableBehavior;
use rustix::thread::ThreadNameSpaceType;
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

/// What the process is to become.
#[derive(Debug, Clone, Copy)]
pub enum Role<'a> {
    /// The first process of a container.
    Init {
        /// The container's.
        id: &'a str,
        plan: &'a ContainerPlan,
        cgroup: Option<&'a Path>,
        /// New namespaces that it was born in.
        born: i32,
        spares: &'a Taken,
        /// For a user namespace: what the agent has opened for it.
        sources: Option<&'a Sources>,
    },
    /// A further one, in the namespaces of the one that the pidfd `init` refers to.
    Exec {
        plan: &'a ProcessPlan,
        init: RawFd,
        /// That one has a user namespace of its own.
        users: bool,
        shared: Shared<'a>,
    },
}

/// What all processes of a container have in common, beside its namespaces and cgroup.
#[derive(Debug, Clone, Copy)]
pub struct Shared<'a> {
    /// What they may ask of the kernel.
    pub seccomp: Option<&'a Filter>,
    /// Their execution domain.
    pub personality: Option<Personality>,
}

/// What the agent gives it.
#[derive(Debug)]
pub struct ChildSetup<'a> {
    /// What it is to become.
    pub role: Role<'a>,
    /// To become descriptors 0, 1 and 2.
    pub stdio: [RawFd; 3],
    /// Its end of the control socket.
    pub control: RawFd,
    /// Initial size of the terminal, if it gets one.
    pub size: Option<WindowSize>,
}

/// Exit status of a process whose set-up failed; no one but the agent ever sees it.
const SETUP_FAILED: i32 = 1;

/// Sets the process up and executes its program.
pub fn run(setup: ChildSetup<'_>) -> ! {
    // SAFETY: the descriptor is open, and it is closed by nothing but the exec or the exit.
    let control = unsafe { BorrowedFd::borrow_raw(setup.control) };
    let result = match setup.role {
        Role::Init {
            id,
            plan,
            cgroup,
            born,
            spares,
            sources,
        } => become_init(&setup, control, (id, plan), cgroup, (born, spares), sources),
        Role::Exec {
            plan,
            init,
            users,
            shared,
        } => become_further(&setup, control, plan, (init, users), shared),
    };
    let Err(failure) = result;
    give_up(control, failure)
}

/// Tells the agent why and ends the process.
pub fn give_up(control: BorrowedFd<'_>, failure: Failure) -> ! {
    // If the agent is gone as well, there is no one left to tell.
    let _ = send(control, &Report::Failed(failure), None);
    end()
}

/// Ends the process.
pub fn end() -> ! {
    // SAFETY: ends the process without running what the agent has registered for its own end.
    unsafe { libc::_exit(SETUP_FAILED) }
}

fn become_init(
    setup: &ChildSetup<'_>,
    control: BorrowedFd<'_>,
    (id, plan): (&str, &ContainerPlan),
    cgroup: Option<&Path>,
    (born, spares): (i32, &Taken),
    sources: Option<&Sources>,
) -> Result<Infallible, Failure> {
    let sys = Linux;
    let users = plan.namespaces.ids.is_some();
    if users && !await_start(control) {
        return Err(Failure::new(Kind::Internal, "never given its ids"));
    }
    // Before their descriptors are closed with the agent's others.
    spares.enter()?;
    let kept = sources.map(Sources::raw).unwrap_or_default();
    prepare(setup, &plan.process, kept)?;
    plan.namespaces.set_up(born, spares)?;
    if users {
        users::become_root()?;
    }
    sysctls::write_own(plan)?;
    let root = plan.rootfs.enter(&sys, cgroup, sources)?;
    let mut master = None;
    if plan.process.terminal {
        let (of_agent, of_process) = terminal::open(setup.size, plan.process.uid)?;
        terminal::mount_console(&sys, root.as_fd(), of_process.as_fd())?;
        terminal::take(of_process.as_fd())?;
        master = Some(of_agent);
    }
    identity::enter_cwd(&plan.process, true)?;
    plan.rootfs.finish(&sys, root.as_fd())?;
    drop(root);
    if users {
        // The folders that the agent has opened are no longer of use.
        let master = master.as_ref().map(AsRawFd::as_raw_fd);
        close_all_but([Some(setup.control), master].into_iter().flatten())?;
    }
    let shared = Shared {
        seccomp: plan.seccomp.as_deref(),
        personality: plan.personality,
    };
    let (program, env) = finish(&plan.process, shared)?;
    ready(control, master)?;
    if !await_start(control) {
        return Err(Failure::new(Kind::Internal, "never started"));
    }
    plan.hooks.run(id)?;
    execute(&program, &plan.process, &env, shared.seccomp)
}

fn become_further(
    setup: &ChildSetup<'_>,
    control: BorrowedFd<'_>,
    plan: &ProcessPlan,
    (init, users): (RawFd, bool),
    shared: Shared<'_>,
) -> Result<Infallible, Failure> {
    plan.scheduling.begin()?;
    prepare(setup, plan, vec![init])?;
    if users {
        // Needs the guest's own capabilities.
        identity::limit(plan)?;
    }
    // Processes of the container see this one from here on: they must not look into the agent's
    // memory, which is still part of it, until the exec has replaced it (CVE-2016-9962).
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context(|| "hide the process from the container")?;
    // SAFETY: the descriptor is open, and it is closed by nothing but the exec or the exit.
    let init = unsafe { BorrowedFd::borrow_raw(init) };
    // The pid namespace is there already, by birth; the cgroup as well.
    let mut all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::TIME;
    if users {
        all |= ThreadNameSpaceType::USER;
    }
    rustix::thread::move_into_thread_name_spaces(init, all)
        .context(|| "join the container's namespaces")?;
    if users {
        users::become_root()?;
    }
    let mut master = None;
    if plan.terminal {
        let (of_agent, of_process) = terminal::open(setup.size, plan.uid)?;
        terminal::take(of_process.as_fd())?;
        master = Some(of_agent);
    }
    identity::enter_cwd(plan, false)?;
    plan.scheduling.finish()?;
    let (program, env) = finish(plan, shared)?;
    if master.is_some() {
        ready(control, master)?;
    }
    execute(&program, plan, &env, shared.seccomp)
}

/// What comes first in every process: nothing of the agent's is left after this.
fn prepare(
    setup: &ChildSetup<'_>,
    plan: &ProcessPlan,
    mut keep: Vec<RawFd>,
) -> Result<(), Failure> {
    heed_broken_pipes();
    // All of them are above 2 (init.rs), so none overwrites another.
    for (number, source) in (0..).zip(setup.stdio) {
        // SAFETY: takes no pointers; replaces descriptors that are only the agent's.
        if unsafe { libc::dup2(source, number) } < 0 {
            return Err(Failure::internal(
                "set up the standard streams",
                last_error(),
            ));
        }
    }
    keep.push(setup.control);
    close_all_but(keep)?;
    rustix::process::setsid().context(|| "start a session")?;
    let admitted = matches!(setup.role, Role::Init { plan, .. } if plan.namespaces.ids.is_some());
    // In a user namespace that has been done from outside (Spawner::admit).
    if let Some(score) = plan.oom_score_adj.filter(|_| !admitted) {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .context(|| format!("process.oomScoreAdj: set {score}"))?;
    }
    // Modes of files and devices are meant as they are.
    rustix::process::umask(rustix::fs::Mode::empty());
    Ok(())
}

/// Streams of other containers must not be kept open by this one, nor the agent's sockets.
pub fn close_all_but(keep: impl IntoIterator<Item = RawFd>) -> Result<(), Failure> {
    let mut keep: Vec<RawFd> = keep.into_iter().collect();
    keep.sort_unstable();
    let mut from = 3;
    for kept in keep {
        close_range(from, kept - 1)?;
        from = from.max(kept + 1);
    }
    close_range(from, RawFd::MAX)
}

/// The clone resets handlers, but not what is ignored.
pub fn heed_broken_pipes() {
    // SAFETY: SIG_DFL runs no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

fn close_range(first: RawFd, last: RawFd) -> Result<(), Failure> {
    if first > last {
        return Ok(());
    }
    // SAFETY: takes no pointers. The owners of these descriptors exist in the agent only; their
    // copies in this process are never used or dropped.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(Failure::internal(
            "close the agent's descriptors",
            last_error(),
        )),
    }
}

/// What comes last in every process before it is ready.
fn finish(plan: &ProcessPlan, shared: Shared<'_>) -> Result<(CString, Vec<CString>), Failure> {
    let env = identity::environment(plan);
    plan.scheduling.apply()?;
    if let Some(personality) = shared.personality {
        personality.apply()?;
    }
    if let (Some(filter), false) = (shared.seccomp, plan.no_new_privileges) {
        // Without no_new_privs this needs a capability that the process is about to lose.
        filter.load()?;
    }
    identity::assume(plan)?;
    let name = plan.args.first().map_or(c"", CString::as_c_str);
    Ok((executable::find(name, &env)?, env))
}

fn ready(control: BorrowedFd<'_>, master: Option<OwnedFd>) -> Result<(), Failure> {
    send(control, &Report::Ready, master.as_ref().map(AsFd::as_fd))
        .context(|| "report to the agent")
}

fn execute(
    program: &CStr,
    plan: &ProcessPlan,
    env: &[CString],
    seccomp: Option<&Filter>,
) -> Result<Infallible, Failure> {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        let strings = strings.iter().map(|string| string.as_ptr());
        strings.chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(&plan.args), pointers(env));
    if let (Some(filter), true) = (seccomp, plan.no_new_privileges) {
        // As late as can be: it need not allow what the set-up itself needs.
        filter.load()?;
    }
    // SAFETY: both lists end with a null pointer, and their strings outlive the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    Err(executable::refused(program, last_error()))
}
