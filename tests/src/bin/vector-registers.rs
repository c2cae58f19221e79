//! Run in a container by the end-to-end tests: keeps a pattern in the vector registers that the CPU
//! says there are, and looks at what is left of it after all that a kernel saves and loads registers
//! for. Prints a line for each, `NAME: ok` or what was wrong.

use std::arch::asm;
use std::sync::atomic::{AtomicU32, Ordering};

const THREADS: u8 = 3;
const ROUNDS: u32 = 40;

/// The widest registers that programs find here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Sse,
    Avx,
    Avx512,
}

impl Width {
    fn found() -> Self {
        match () {
            () if std::arch::is_x86_feature_detected!("avx512f") => Self::Avx512,
            () if std::arch::is_x86_feature_detected!("avx") => Self::Avx,
            () => Self::Sse,
        }
    }
}

/// System call with up to three arguments; what it returns.
#[derive(Clone, Copy)]
struct Call(libc::c_long, [libc::c_long; 3]);

/// What registers hold after a call: one of the first 16 as far as it is wide, then, with AVX-512,
/// one of the other 16.
type Kept = [u8; 128];

fn main() {
    let width = Width::found();
    println!("width: {width:?}");
    report("listed", is_listed(width));
    report("switch", through_switches(width));
    report("signal", through_signals(width));
    report("fork", through_a_fork(width));
    report("ptrace", through_a_tracer(width));
}

fn report(name: &str, wrong: Option<String>) {
    println!("{name}: {}", wrong.unwrap_or_else(|| "ok".into()));
}

/// Whether the kernel knows of what the CPU says.
fn is_listed(width: Width) -> Option<String> {
    let flag = match width {
        Width::Sse => "sse2",
        Width::Avx => "avx",
        Width::Avx512 => "avx512f",
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let listed = cpu.split_whitespace().any(|word| word == flag);
    (!listed).then(|| format!("{flag} is not in /proc/cpuinfo"))
}

/// Several threads that give up the CPU again and again, each with a pattern of its own.
fn through_switches(width: Width) -> Option<String> {
    const YIELD: Call = Call(libc::SYS_sched_yield, [0; 3]);
    let threads: Vec<_> = (1..=THREADS)
        .map(|pattern| {
            std::thread::spawn(move || {
                (0..ROUNDS)
                    .filter(|_| !holds(&through(width, pattern, YIELD).0, width, pattern))
                    .count()
            })
        })
        .collect();
    let threads = threads.into_iter();
    let lost: usize = threads.map(|thread| thread.join().unwrap_or(1)).sum();
    (lost > 0).then(|| format!("{lost} lost"))
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

/// A handler that leaves other patterns in them, and runs before the system call returns.
fn through_signals(width: Width) -> Option<String> {
    extern "C" fn overwrite(_: libc::c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
        through(Width::found(), 0xee, Call(libc::SYS_getpid, [0; 3]));
    }
    let handler: extern "C" fn(libc::c_int) = overwrite;
    // SAFETY: the handler does nothing that a handler may not do; the calls take plain numbers.
    let (pid, tid) = unsafe {
        libc::signal(libc::SIGUSR1, handler as libc::sighandler_t);
        (libc::getpid(), libc::gettid())
    };
    let signal = [pid, tid, libc::SIGUSR1].map(libc::c_long::from);
    let lost = (0..ROUNDS)
        .map(|round| round as u8 + 1)
        .filter(|pattern| {
            let (kept, _) = through(width, *pattern, Call(libc::SYS_tgkill, signal));
            !holds(&kept, width, *pattern)
        })
        .count();
    let handled = HANDLED.load(Ordering::Relaxed);
    (lost > 0 || handled != ROUNDS).then(|| format!("{lost} lost, {handled} handled"))
}

/// Parent and child have the same.
fn through_a_fork(width: Width) -> Option<String> {
    let (kept, child) = through(width, 0x5a, Call(libc::SYS_fork, [0; 3]));
    let kept = holds(&kept, width, 0x5a);
    if child == 0 {
        leave(kept);
    }
    let inherited = exit_status(child) == Some(0);
    (!kept || !inherited).then(|| format!("kept {kept}, inherited {inherited}"))
}

/// A tracer reads them, and writes others.
fn through_a_tracer(width: Width) -> Option<String> {
    const WRITTEN: u8 = 0x77;
    // SAFETY: this process has one thread by now; the child makes system calls only.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: plain numbers.
        let pid = unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::getpid()
        };
        let stop = [pid, libc::SIGSTOP, 0].map(libc::c_long::from);
        let (kept, _) = through(width, 0x33, Call(libc::SYS_kill, stop));
        leave(holds(&kept, width, WRITTEN));
    }
    let mut status = 0;
    // SAFETY: the status is valid for writes.
    unsafe { libc::waitpid(child, &mut status, 0) };
    if !libc::WIFSTOPPED(status) {
        return Some(format!("the child is not stopped: {status:#x}"));
    }
    let mut area = [0u8; 4096];
    let mut read = libc::iovec {
        iov_base: area.as_mut_ptr().cast(),
        iov_len: area.len(),
    };
    // Numbers of elf.h: without XSAVE there is but NT_PRFPREG, FXSAVE's area, which begins alike;
    // otherwise NT_X86_XSTATE.
    let registers: libc::c_long = if width == Width::Sse { 2 } else { 0x202 };
    // SAFETY: the kernel writes no more than the length.
    let failed = unsafe { libc::ptrace(libc::PTRACE_GETREGSET, child, registers, &mut read) };
    let parts = parts_of_register_5(width);
    let found = parts
        .iter()
        .all(|part| area[part.clone()].iter().all(|byte| *byte == 0x33));
    for part in parts {
        area[part].fill(WRITTEN);
    }
    if width == Width::Avx512 {
        let (size, offset) = component(7);
        let sixteenth = 64 * (SECOND_REGISTER - 16);
        assert!(sixteenth + 64 <= size);
        area[offset + sixteenth..][..64].fill(WRITTEN);
    }
    // SAFETY: the kernel reads no more than the length, which is what it wrote.
    let set = unsafe { libc::ptrace(libc::PTRACE_SETREGSET, child, registers, &mut read) };
    // SAFETY: plain numbers.
    unsafe { libc::ptrace(libc::PTRACE_CONT, child, 0, 0) };
    let taken = exit_status(child.into()) == Some(0);
    let right = failed == 0 && set == 0 && found && taken;
    (!right).then(|| format!("get {failed}, found {found}, set {set}, taken {taken}"))
}

/// Where register 5 is in an area of XSAVE (Intel SDM 1, §13.4 and §13.5).
fn parts_of_register_5(width: Width) -> Vec<std::ops::Range<usize>> {
    let part = |start: usize, length: usize| start..start + length;
    let mut parts = vec![part(160 + 5 * 16, 16)];
    if width != Width::Sse {
        parts.push(part(component(2).1 + 5 * 16, 16));
    }
    if width == Width::Avx512 {
        parts.push(part(component(6).1 + 5 * 32, 32));
    }
    parts
}

/// Size and offset of a component in the standard format.
fn component(index: u32) -> (usize, usize) {
    // SAFETY: whoever has AVX has the leaf. (Older compilers ask for the block.)
    #[allow(unused_unsafe)]
    let leaf = unsafe { std::arch::x86_64::__cpuid_count(0xd, index) };
    (leaf.eax as usize, leaf.ebx as usize)
}

fn leave(well: bool) -> ! {
    // SAFETY: ends this process.
    unsafe { libc::_exit(i32::from(!well)) }
}

fn exit_status(child: libc::c_long) -> Option<i32> {
    let mut status = 0;
    // SAFETY: the status is valid for writes.
    unsafe { libc::waitpid(child as libc::pid_t, &mut status, 0) };
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

fn holds(kept: &Kept, width: Width, pattern: u8) -> bool {
    let length = match width {
        Width::Sse => 16,
        Width::Avx => 32,
        Width::Avx512 => 128,
    };
    kept[..length].iter().all(|byte| *byte == pattern)
}

/// What registers hold after a system call, before which each byte of them was `pattern`; and what it
/// returned.
fn through(width: Width, pattern: u8, call: Call) -> (Kept, libc::c_long) {
    match width {
        Width::Sse => through_sse(pattern, call),
        // SAFETY: the CPU and the kernel have AVX, as `main` has found out.
        Width::Avx => unsafe { through_avx(pattern, call) },
        // SAFETY: and AVX-512.
        Width::Avx512 => unsafe { through_avx512(pattern, call) },
    }
}

/// The number of the second register that AVX-512 is tried with.
const SECOND_REGISTER: usize = 20;

/// A system call between `load` and `store`, which address the patterns and what is kept of them.
/// None of the calls here writes memory but by their return.
macro_rules! call_between {
    ($pattern:expr, $call:expr, [$($load:literal),*], [$($store:literal),*], $($clobber:tt)*) => {{
        let given = [$pattern; 128];
        let mut kept = [0; 128];
        let Call(number, [first, second, third]) = $call;
        let returned: libc::c_long;
        // SAFETY: reads and writes at most 128 bytes of arrays that long; a system call changes but
        // RAX, RCX and R11, and memory that the compiler takes for changed.
        unsafe {
            asm!(
                $($load,)*
                "syscall",
                $($store,)*
                given = in(reg) given.as_ptr(),
                kept = in(reg) kept.as_mut_ptr(),
                inout("rax") number => returned,
                in("rdi") first,
                in("rsi") second,
                in("rdx") third,
                out("rcx") _,
                out("r11") _,
                $($clobber)*
            );
        }
        (kept, returned)
    }};
}

#[target_feature(enable = "avx512f")]
fn through_avx512(pattern: u8, call: Call) -> (Kept, libc::c_long) {
    call_between!(
        pattern,
        call,
        ["vmovdqu64 zmm5, [{given}]", "vmovdqu64 zmm20, [{given} + 64]"],
        ["vmovdqu64 [{kept}], zmm5", "vmovdqu64 [{kept} + 64], zmm20"],
        out("zmm5") _,
        out("zmm20") _,
    )
}

#[target_feature(enable = "avx")]
fn through_avx(pattern: u8, call: Call) -> (Kept, libc::c_long) {
    call_between!(
        pattern,
        call,
        ["vmovdqu ymm5, [{given}]"],
        ["vmovdqu [{kept}], ymm5"],
        out("ymm5") _,
    )
}

fn through_sse(pattern: u8, call: Call) -> (Kept, libc::c_long) {
    call_between!(
        pattern,
        call,
        ["movdqu xmm5, [{given}]"],
        ["movdqu [{kept}], xmm5"],
        out("xmm5") _,
    )
}
