//! One system-call allow-list for each kind of thread, installed before any guest instruction
//! runs. What is not listed ends the process with a line that names the call.

use std::collections::BTreeMap;
use std::sync::Arc;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use thiserror::Error;

use crate::virtio::net::{tap_ioctls as tap, vhost_ioctls as vhost};

/// The kinds of thread of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadKind {
    /// Control socket and end of the machine.
    Main,
    /// In KVM_RUN.
    Vcpu,
    /// Virtqueues of all devices but virtio-fs.
    Events,
    /// virtio-fs: works on the share for the guest.
    FileServer,
}

/// Run first in each thread, with its kind.
pub type ThreadStart = Arc<dyn Fn(ThreadKind) + Send + Sync>;

/// A filter could not be made or installed.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// A rule is malformed: a mistake of ours.
    #[error("compiling the seccomp filter of {0:?} threads: {1}")]
    Compile(ThreadKind, #[source] seccompiler::BackendError),
    /// The kernel refused the filter.
    #[error("installing the seccomp filter of {0:?} threads: {1}; is CONFIG_SECCOMP_FILTER on?")]
    Install(ThreadKind, #[source] seccompiler::Error),
}

/// What every thread needs: memory, locks, time, signals on return, writing its log, and its end.
const COMMON: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
];

const MAIN: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_getrandom,
    // Plugging a device.
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    // Saving a template.
    libc::SYS_fsync,
    libc::SYS_ftruncate,
];

const VCPU: &[i64] = &[libc::SYS_getrandom];

const EVENTS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_getrandom,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_timerfd_settime,
    libc::SYS_writev,
    libc::SYS_lseek,
];

const FILE_SERVER: &[i64] = &[
    libc::SYS_copy_file_range,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getrandom,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_setxattr,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_writev,
];

/// ioctls of vCPU threads: KVM_RUN, and what the report of a failure reads.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_TRANSLATE: u64 = 0xc018_ae85;
/// Also of vCPU threads, where they save and load extended registers for the guest's kernel. That
/// changes nothing but their own vCPU's registers.
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_SET_XSAVE: u64 = 0x5000_aea5;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_SET_XCRS: u64 = 0x4188_aea7;
/// ioctls of the main thread, which reads the state of paused vCPUs and of the VM for a template.
/// None of them sets anything.
const SAVE: &[u64] = &[
    KVM_GET_REGS,
    0xae03,      // KVM_CHECK_EXTENSION
    0xc004_ae02, // KVM_GET_MSR_INDEX_LIST
    0xc208_ae62, // KVM_GET_IRQCHIP
    0x8030_ae7c, // KVM_GET_CLOCK
    0x8070_ae9f, // KVM_GET_PIT2
    0x8138_ae83, // KVM_GET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x8400_ae8e, // KVM_GET_LAPIC
    0x8004_ae98, // KVM_GET_MP_STATE
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0xaea3,      // KVM_GET_TSC_KHZ
    KVM_GET_XSAVE,
    KVM_GET_XCRS,
];
/// ioctls of the main thread, which connects and disconnects plugged devices: it can give the guest
/// interrupts, and have KVM tell it of writes to addresses.
const PLUG: &[u64] = &[
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4010_ae67, // KVM_REGISTER_COALESCED_MMIO
    0x4010_ae68, // KVM_UNREGISTER_COALESCED_MMIO
    tap::GET_INTERFACE,
    tap::SET_HEADER_LENGTH,
    tap::SET_OFFLOAD,
];
/// Of all threads: each serves devices that interrupt the guest.
const KVM_IRQ_LINE: u64 = 0x4008_ae61;
/// Plugging memory. Of this process's memory, which is all that it can give to the guest, the
/// thread that may do it holds none that the guest's own devices don't.
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
/// How the standard library makes a socket non-blocking.
const FIONBIO: u64 = 0x5421;
/// Discarding blocks of a block device.
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;

/// The filters, compiled on the main thread, to be installed by each thread for itself.
pub struct Filters(BTreeMap<ThreadKind, BpfProgram>);

impl Filters {
    /// Compiles all filters.
    ///
    /// # Errors
    /// [`SeccompError::Compile`].
    pub fn compile() -> Result<Self, SeccompError> {
        [
            ThreadKind::Main,
            ThreadKind::Vcpu,
            ThreadKind::Events,
            ThreadKind::FileServer,
        ]
        .into_iter()
        .map(|kind| {
            compile(kind)
                .map(|program| (kind, program))
                .map_err(|error| SeccompError::Compile(kind, error))
        })
        .collect::<Result<_, _>>()
        .map(Self)
    }

    /// Installs the calling thread's filter; there is no way back.
    ///
    /// # Errors
    /// [`SeccompError::Install`].
    pub fn install(&self, kind: ThreadKind) -> Result<(), SeccompError> {
        seccompiler::apply_filter(&self.0[&kind])
            .map_err(|error| SeccompError::Install(kind, error))
    }
}

fn compile(kind: ThreadKind) -> Result<BpfProgram, seccompiler::BackendError> {
    let (calls, ioctls): (&[i64], Vec<u64>) = match kind {
        ThreadKind::Main => (MAIN, [&[FIONBIO], SAVE, PLUG, &vhost::plug()].concat()),
        ThreadKind::Vcpu => (
            VCPU,
            vec![
                KVM_RUN,
                KVM_GET_XSAVE,
                KVM_SET_XSAVE,
                KVM_GET_XCRS,
                KVM_SET_XCRS,
                KVM_GET_REGS,
                KVM_TRANSLATE,
            ],
        ),
        ThreadKind::Events => (
            EVENTS,
            [
                &[
                    FIONBIO,
                    BLKDISCARD,
                    BLKZEROOUT,
                    KVM_SET_USER_MEMORY_REGION,
                    tap::SET_OFFLOAD,
                    tap::SET_QUEUE,
                ][..],
                &vhost::activate(),
            ]
            .concat(),
        ),
        ThreadKind::FileServer => (FILE_SERVER, Vec::new()),
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = COMMON
        .iter()
        .chain(calls)
        .map(|call| (*call, Vec::new()))
        .collect();
    rules.insert(libc::SYS_mmap, vec![without_flag(2, libc::PROT_EXEC)?]);
    rules.insert(libc::SYS_mprotect, vec![without_flag(2, libc::PROT_EXEC)?]);
    // What the allocator, a thread's end and the balloon have in common.
    rules.insert(
        libc::SYS_madvise,
        vec![argument_is(2, libc::MADV_DONTNEED as u64)?],
    );
    rules.insert(
        libc::SYS_fcntl,
        vec![
            // Duplicating an event descriptor at a device's activation.
            argument_is(1, libc::F_DUPFD_CLOEXEC as u64)?,
            // What the standard library checks on closing, in debug builds.
            argument_is(1, libc::F_GETFD as u64)?,
        ],
    );
    if kind == ThreadKind::FileServer {
        // The file server changes flags of files as the guest asks.
        rules.insert(libc::SYS_fcntl, Vec::new());
    }
    let ioctls = ioctls
        .iter()
        .chain(&[KVM_IRQ_LINE])
        .map(|number| argument_is(1, *number))
        .collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_ioctl, ioctls);
    SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

fn argument_is(index: u8, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        index,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        value,
    )?])
}

fn without_flag(index: u8, flag: i32) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        index,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(flag as u64),
        0,
    )?])
}

/// Exit status of a process that a filter ended: 128 + SIGSYS, as a shell shows it.
const EXIT_TRAPPED: i32 = 128 + libc::SIGSYS;

/// Makes a trapped call end the process with a line that names it.
///
/// # Errors
/// When the handler can't be set.
pub fn report_trapped_calls() -> Result<(), std::io::Error> {
    extern "C" fn report(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // siginfo_t of SIGSYS: si_call_addr, then the call's number
        // (include/uapi/asm-generic/siginfo.h).
        const CALL_NUMBER_OFFSET: usize = 24;
        // SAFETY: the kernel passes a whole siginfo_t, whose SIGSYS form has the number there.
        let number = unsafe { *info.byte_add(CALL_NUMBER_OFFSET).cast::<i32>() };
        let mut line = *b"bulkhead-vmm: seccomp: system call 000 is not on this thread's list\n";
        const DIGITS: usize = 35;
        for (place, divisor) in [100, 10, 1].into_iter().enumerate() {
            line[DIGITS + place] = b'0' + (number / divisor % 10) as u8;
        }
        // SAFETY: both calls are async-signal-safe and on every thread's list.
        unsafe {
            libc::write(2, line.as_ptr().cast(), line.len());
            libc::_exit(EXIT_TRAPPED);
        }
    }
    vmm_sys_util::signal::register_signal_handler(libc::SIGSYS, report)
        .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` in a child process under the filter of `kind`; its exit status.
    fn in_child(kind: ThreadKind, body: fn()) -> i32 {
        let filters = Filters::compile().unwrap();
        // SAFETY: the child only makes system calls and leaves by _exit.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let _ = report_trapped_calls();
                let installed = filters.install(kind).is_ok();
                body();
                // SAFETY: ends the child without running the parent's clean-up.
                unsafe { libc::_exit(if installed { 0 } else { 1 }) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                match nix::sys::wait::waitpid(child, None).unwrap() {
                    nix::sys::wait::WaitStatus::Exited(_, code) => code,
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_listed_call_passes_and_another_ends_the_process() {
        for kind in [
            ThreadKind::Main,
            ThreadKind::Vcpu,
            ThreadKind::Events,
            ThreadKind::FileServer,
        ] {
            let listed = || {
                // SAFETY: no arguments.
                unsafe { libc::getpid() };
            };
            assert_eq!(in_child(kind, listed), 0, "{kind:?}");
            let other = || {
                // SAFETY: no memory arguments.
                unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
            };
            assert_eq!(in_child(kind, other), EXIT_TRAPPED, "{kind:?}");
        }
    }

    #[test]
    fn a_vcpu_thread_has_no_other_ioctl() {
        let other = || {
            // SAFETY: on a bad descriptor no memory is touched.
            unsafe { libc::ioctl(-1, libc::TCGETS, 0) };
        };
        assert_eq!(in_child(ThreadKind::Vcpu, other), EXIT_TRAPPED);
    }

    #[test]
    fn every_thread_may_interrupt_the_guest() {
        for kind in [
            ThreadKind::Main,
            ThreadKind::Vcpu,
            ThreadKind::Events,
            ThreadKind::FileServer,
        ] {
            let interrupt = || {
                // SAFETY: on a bad descriptor no memory is touched.
                unsafe { libc::ioctl(-1, KVM_IRQ_LINE as _, 0) };
            };
            assert_eq!(in_child(kind, interrupt), 0, "{kind:?}");
        }
    }

    #[test]
    fn memory_is_only_advised_away() {
        fn advise(advice: libc::c_int) {
            // SAFETY: no byte is advised on.
            unsafe { libc::madvise(std::ptr::null_mut(), 0, advice) };
        }
        let away = || advise(libc::MADV_DONTNEED);
        assert_eq!(in_child(ThreadKind::Events, away), 0);
        let other = || advise(libc::MADV_DOFORK);
        assert_eq!(in_child(ThreadKind::Events, other), EXIT_TRAPPED);
    }

    #[test]
    fn nothing_maps_executable_memory() {
        let map = || {
            // SAFETY: a fresh anonymous mapping.
            unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
        };
        assert_eq!(in_child(ThreadKind::FileServer, map), EXIT_TRAPPED);
    }
}
