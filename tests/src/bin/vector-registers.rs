//! Run in a container by the end-to-end tests: keeps patterns in vector registers, in several threads
//! that give up the CPU again and again, and prints how often one was lost. The registers are AVX's
//! if there is AVX: as /proc/cpuinfo has it with the argument `listed`, as the CPU says with `seen`.

use std::arch::asm;

const THREADS: u8 = 3;
const ROUNDS: u32 = 40;

fn main() {
    let seen = std::arch::is_x86_feature_detected!("avx");
    let wide = match std::env::args().nth(1).as_deref() {
        Some("listed") => seen && listed(),
        _ => seen,
    };
    let threads: Vec<_> = (1..=THREADS)
        .map(|pattern| std::thread::spawn(move || lost(pattern, wide)))
        .collect();
    let lost: u32 = threads
        .into_iter()
        .map(|thread| thread.join().unwrap_or(ROUNDS))
        .sum();
    let registers = if wide { "ymm" } else { "xmm" };
    println!("{registers}: {lost} lost");
}

fn listed() -> bool {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu.split_whitespace().any(|flag| flag == "avx")
}

fn lost(pattern: u8, wide: bool) -> u32 {
    let given = [pattern; 32];
    let mut lost = 0;
    for _ in 0..ROUNDS {
        let (kept, length) = match wide {
            // SAFETY: the CPU and the kernel have AVX, as `main` has found out.
            true => (unsafe { through_ymm(&given) }, 32),
            false => (through_xmm(&given), 16),
        };
        lost += u32::from(kept[..length] != given[..length]);
    }
    lost
}

/// What a register holds after others have had their turn.
#[target_feature(enable = "avx")]
fn through_ymm(given: &[u8; 32]) -> [u8; 32] {
    let mut kept = [0; 32];
    // SAFETY: reads and writes 32 bytes of arrays that long; sched_yield(2) takes no arguments, and
    // changes but RAX, RCX and R11.
    unsafe {
        asm!(
            "vmovdqu ymm5, [{given}]",
            "syscall",
            "vmovdqu [{kept}], ymm5",
            given = in(reg) given.as_ptr(),
            kept = in(reg) kept.as_mut_ptr(),
            inout("rax") libc::SYS_sched_yield => _,
            out("rcx") _,
            out("r11") _,
            out("ymm5") _,
        );
    }
    kept
}

fn through_xmm(given: &[u8; 32]) -> [u8; 32] {
    let mut kept = [0; 32];
    // SAFETY: as above, with the first 16 bytes of each.
    unsafe {
        asm!(
            "movdqu xmm5, [{given}]",
            "syscall",
            "movdqu [{kept}], xmm5",
            given = in(reg) given.as_ptr(),
            kept = in(reg) kept.as_mut_ptr(),
            inout("rax") libc::SYS_sched_yield => _,
            out("rcx") _,
            out("r11") _,
            out("xmm5") _,
        );
    }
    kept
}
