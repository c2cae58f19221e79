//! Numbers of system calls, by the three ABIs that an x86-64 kernel can have.

/// A calling convention with its own numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abi {
    /// The native one.
    X86_64,
    /// 32-bit pointers in 64-bit mode: the native architecture to the kernel, with a bit set in the
    /// number.
    X32,
    /// 32-bit programs.
    X86,
}

/// Set in the numbers of x32 (`__X32_SYSCALL_BIT`).
pub const X32_BIT: u32 = 0x4000_0000;

/// Calls whose x32 number isn't the native one, in their order from [`FIRST_OF_X32`] (the kernel's
/// syscall_64.tbl).
const ONLY_X32: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];
const FIRST_OF_X32: u32 = 512;

impl Abi {
    /// The number of the call `name`; `None` if this ABI has no such call.
    pub fn number(self, name: &str) -> Option<u32> {
        let native = || {
            name.parse()
                .ok()
                .map(|call: syscalls::x86_64::Sysno| call.id())
        };
        let number = match self {
            Self::X86_64 => native(),
            Self::X86 => name
                .parse()
                .ok()
                .map(|call: syscalls::x86::Sysno| call.id()),
            Self::X32 => {
                let special = ONLY_X32.iter().position(|other| *other == name);
                return match special.and_then(|index| u32::try_from(index).ok()) {
                    Some(index) => Some((FIRST_OF_X32 + index) | X32_BIT),
                    None => Some(u32::try_from(native()?).ok()? | X32_BIT),
                };
            }
        };
        u32::try_from(number?).ok()
    }

    /// As the kernel tells filters (`AUDIT_ARCH_*`).
    pub fn audit_number(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
        }
    }

    /// Whether arguments have 64 bits.
    pub fn is_wide(self) -> bool {
        self == Self::X86_64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(Abi::X86_64.number("read"), Some(0));
        assert_eq!(
            Abi::X86_64.number("clone3").map(i64::from),
            Some(libc::SYS_clone3)
        );
        assert_eq!(Abi::X86.number("read"), Some(3));
        assert_eq!(Abi::X86.number("socketcall"), Some(102));
        assert_eq!(Abi::X86_64.number("socketcall"), None);
        assert_eq!(Abi::X32.number("read"), Some(X32_BIT));
        assert_eq!(Abi::X32.number("ioctl"), Some(X32_BIT | 514));
        assert_eq!(Abi::X32.number("pwritev2"), Some(X32_BIT | 547));
        assert_eq!(Abi::X86_64.number("no_such_call"), None);
    }
}
