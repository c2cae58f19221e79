//! Which guest kernel functions a boot's instructions go to.

use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::perf::EmulateTracepoint;
use bulkhead_tests::vm::VmSpec;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Every how many instructions a sample is taken. A prime, so as not to keep step with loops.
const PERIOD: u64 = 499;

/// How many functions are printed.
const LINES: usize = 40;

/// Boots once more and prints the functions by their share.
///
/// # Errors
/// When the VM doesn't get ready, or the kernel's symbols are missing.
pub fn print(
    artifacts: &Artifacts,
    tracepoint: EmulateTracepoint,
    timeout: Duration,
) -> Result<()> {
    let symbols = Symbols::read(artifacts)?;
    eprintln!("one more boot, with a sample every {PERIOD} instructions");
    let prepared = VmSpec::default().prepare(artifacts)?;
    let mut sampler = tracepoint.sample(prepared.pid(), PERIOD)?;
    let vm = prepared.run()?;
    let end = Instant::now() + timeout;
    let mut by_address = HashMap::new();
    loop {
        match vm.wait_ready(Duration::from_millis(50)) {
            Err(Error::TimedOut { .. }) if Instant::now() < end => sampler.drain(&mut by_address),
            other => {
                other?;
                break;
            }
        }
    }
    sampler.drain(&mut by_address);
    println!();
    print_functions(&symbols, &by_address);
    Ok(())
}

/// Prints the functions to which sampled instructions belong, by their share.
pub fn print_functions(symbols: &Symbols, by_address: &HashMap<u64, u64>) {
    let total: u64 = by_address.values().sum();
    let mut by_function: HashMap<&str, u64> = HashMap::new();
    for (address, samples) in by_address {
        *by_function.entry(symbols.name(*address)).or_default() += samples;
    }
    let mut sorted: Vec<_> = by_function.into_iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    println!(
        "{:>8}  {:>6}  guest kernel function ({total} samples)",
        "samples", "share"
    );
    for (name, samples) in sorted.iter().take(LINES) {
        let share = *samples as f64 * 100.0 / total.max(1) as f64;
        println!("{samples:>8}  {share:>5.1}%  {name}");
    }
}

/// The kernel's functions by address.
pub struct Symbols {
    by_address: BTreeMap<u64, String>,
}

impl Symbols {
    /// Reads them.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn read(artifacts: &Artifacts) -> Result<Self> {
        let path = artifacts.system_map();
        let text = std::fs::read_to_string(&path)
            .context(|| format!("read the kernel's symbols from {}", path.display()))?;
        let mut by_address = BTreeMap::new();
        for line in text.lines() {
            let mut fields = line.split(' ');
            if let (Some(address), Some("t" | "T" | "w" | "W"), Some(name)) =
                (fields.next(), fields.next(), fields.next())
                && let Ok(address) = u64::from_str_radix(address, 16)
            {
                by_address.insert(address, name.to_owned());
            }
        }
        Ok(Self { by_address })
    }

    fn name(&self, address: u64) -> &str {
        let below = self.by_address.range(..=address).next_back();
        below.map_or(
            "(before the kernel: the probe or boot code)",
            |(_, name)| name,
        )
    }
}
