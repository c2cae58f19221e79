//! Places in the guest kernel at which a watch tells the time, by the kernel's symbols.

use bulkhead_tests::Artifacts;
use bulkhead_tests::perf::{Seen, What};

/// Linux maps itself here (`__START_KERNEL_map`, Documentation/arch/x86/x86_64/mm.rst); before it
/// has done so it runs at its physical address.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Addresses of guest instructions.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    /// Where the kernel is entered: at the 64-bit entry point, or by PVH.
    entries: Vec<u64>,
    /// A connection request on a vsock: the agent's first one is its knock.
    knock: Option<u64>,
    /// The end of execve: the process goes on at its program's first instruction.
    exec: Option<u64>,
}

impl Marks {
    /// Looks the symbols up; one that the kernel hasn't stays unknown.
    pub fn find(artifacts: &Artifacts) -> Self {
        let symbols = std::fs::read_to_string(artifacts.system_map()).unwrap_or_default();
        let address = |name: &str| address_of(&symbols, name);
        let physical = |name: &str| address(name)?.checked_sub(KERNEL_MAP);
        Self {
            entries: ["startup_64", "pvh_start_xen"]
                .into_iter()
                .filter_map(physical)
                .collect(),
            knock: address("vsock_connect"),
            exec: address("start_thread"),
        }
    }

    /// All of them, for a watch.
    pub fn addresses(&self) -> Vec<u64> {
        let mut all = self.entries.clone();
        all.extend(self.knock);
        all.extend(self.exec);
        all
    }

    /// The guest kernel's first instruction.
    pub fn is_entry(&self, seen: &Seen) -> bool {
        matches!(seen.what, What::Instruction(address) if self.entries.contains(&address))
    }

    /// The agent's knock.
    pub fn is_knock(&self, seen: &Seen) -> bool {
        matches!(seen.what, What::Instruction(address) if Some(address) == self.knock)
    }

    /// A process in the guest comes to a program's first instruction.
    pub fn is_exec(&self, seen: &Seen) -> bool {
        matches!(seen.what, What::Instruction(address) if Some(address) == self.exec)
    }
}

/// The address of a function in System.map's lines: address, kind, name.
fn address_of(symbols: &str, name: &str) -> Option<u64> {
    symbols.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let address = fields.next()?;
        let is_text = matches!(fields.next()?, "t" | "T");
        (is_text && fields.next()? == name).then(|| u64::from_str_radix(address, 16).ok())?
    })
}
