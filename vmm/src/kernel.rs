//! The guest kernel: an uncompressed ELF vmlinux, copied to where its program headers say.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;

use linux_loader::loader::{Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout;

/// Offsets and values of the ELF header and of program headers (System V ABI, "ELF Header" and
/// "Program Header"; ELF-64 layout).
const HEADER_LEN: usize = 64;
const E_MACHINE: usize = 18;
const E_PHOFF: usize = 32;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
const PROGRAM_HEADER_LEN: usize = 56;
const P_VADDR: usize = 16;
const PT_LOAD: u32 = 1;
const EM_X86_64: u16 = 62;
/// Linux is linked for the upper half of the address space, programs for the lower one.
const UPPER_HALF: u64 = 0xffff_8000_0000_0000;

/// Why an image can't be booted.
#[derive(Debug, Error)]
#[error(
    "the guest kernel can't be loaded: {0}; it must be an uncompressed ELF vmlinux for x86-64 that \
     fits the guest's memory, as guest-kernel/build makes it"
)]
pub struct KernelError(#[from] Reason);

/// What exactly is wrong.
#[derive(Debug, Error)]
pub enum Reason {
    /// The file can't be read.
    #[error("reading it failed: {0}")]
    Read(#[from] io::Error),
    /// Another processor's.
    #[error("its ELF machine type is {0}, not {EM_X86_64}")]
    Machine(u16),
    /// An ordinary program.
    #[error("it is a program, not a kernel: nothing of it is linked for the upper half")]
    Program,
    /// Something else altogether.
    #[error("it does not begin as an ELF file does")]
    NotElf,
    /// Damaged, or too large for the guest's memory.
    #[error("{0}")]
    Load(#[from] linux_loader::loader::Error),
}

/// Copies the kernel to guest memory; its 64-bit entry point.
///
/// # Errors
/// [`KernelError`].
pub fn load(memory: &GuestMemoryMmap, mut kernel: File) -> Result<GuestAddress, KernelError> {
    kernel.rewind().map_err(Reason::from)?;
    check_machine(&kernel)?;
    let loaded = Elf::load(
        memory,
        None,
        &mut kernel,
        Some(GuestAddress(layout::HIGH_RAM)),
    )
    .map_err(Reason::from)?;
    Ok(loaded.kernel_load)
}

/// What the loader doesn't look at: whose machine code this is, and whether it is a kernel's.
fn check_machine(kernel: &File) -> Result<(), Reason> {
    let mut header = [0u8; HEADER_LEN];
    kernel.read_exact_at(&mut header, 0)?;
    if !header.starts_with(b"\x7fELF") {
        return Err(Reason::NotElf);
    }
    let machine = half(&header, E_MACHINE);
    if machine != EM_X86_64 {
        return Err(Reason::Machine(machine));
    }
    let mut table_offset = [0u8; 8];
    table_offset.copy_from_slice(&header[E_PHOFF..E_PHOFF + 8]);
    let table = u64::from_le_bytes(table_offset);
    for index in 0..u64::from(half(&header, E_PHNUM)) {
        let mut entry = [0u8; PROGRAM_HEADER_LEN];
        let offset = index * u64::from(half(&header, E_PHENTSIZE));
        kernel.read_exact_at(&mut entry, table.saturating_add(offset))?;
        let mut kind = [0u8; 4];
        kind.copy_from_slice(&entry[..4]);
        let mut address = [0u8; 8];
        address.copy_from_slice(&entry[P_VADDR..P_VADDR + 8]);
        if u32::from_le_bytes(kind) == PT_LOAD && u64::from_le_bytes(address) >= UPPER_HALF {
            return Ok(());
        }
    }
    Err(Reason::Program)
}

fn half(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(machine: u16, address: u64) -> File {
        let mut bytes = vec![0u8; HEADER_LEN + PROGRAM_HEADER_LEN];
        bytes[..4].copy_from_slice(b"\x7fELF");
        bytes[E_MACHINE..E_MACHINE + 2].copy_from_slice(&machine.to_le_bytes());
        bytes[E_PHOFF] = HEADER_LEN as u8;
        bytes[E_PHENTSIZE] = PROGRAM_HEADER_LEN as u8;
        bytes[E_PHNUM] = 1;
        bytes[HEADER_LEN] = PT_LOAD as u8;
        let start = HEADER_LEN + P_VADDR;
        bytes[start..start + 8].copy_from_slice(&address.to_le_bytes());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn only_an_x86_64_kernel_passes() {
        let kernel = 0xffff_ffff_8100_0000;
        assert!(check_machine(&image(EM_X86_64, kernel)).is_ok());
        let other = check_machine(&image(183, kernel)).unwrap_err();
        assert!(other.to_string().contains("183"), "{other}");
        let program = check_machine(&image(EM_X86_64, 0x40_0000)).unwrap_err();
        assert!(matches!(program, Reason::Program));
    }

    #[test]
    fn what_is_no_elf_file_or_cut_short_is_refused() {
        let memory = crate::memory::allocate(32 << 20).unwrap();
        let mut script = tempfile::tempfile().unwrap();
        script.write_all(&[b'#'; 100]).unwrap();
        assert!(load(&memory, script).is_err());
        assert!(load(&memory, tempfile::tempfile().unwrap()).is_err());
    }
}
