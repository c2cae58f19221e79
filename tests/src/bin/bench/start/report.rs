//! The result of a comparison of starts, for people and for programs.

use crate::host::Machine;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::error::{Error, Result};
use bulkhead_tests::figures::{Figure, Samples, Subject};
use bulkhead_tests::stats::rounded;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// What is divided by what: the bigger one, as expected, first.
const RATIOS: [(Subject, Subject); 4] = [
    (Subject::Cold, Subject::Template),
    (Subject::QemuMicrovm, Subject::Cold),
    (Subject::QemuMicrovm, Subject::Template),
    (Subject::Template, Subject::Runc),
];

/// Figures whose quartiles are printed; the JSON has all.
const COMPARED: [Figure; 4] = [
    Figure::VmmToGuestMs,
    Figure::VmmToAgentMs,
    Figure::FirstOutputMs,
    Figure::CommandToOutputMs,
];

/// Everything that was measured.
pub struct Report {
    /// How guest kernel mode runs.
    pub kvm: KvmKind,
    /// On what.
    pub machine: Machine,
    /// How often.
    pub rounds: u32,
    /// By subject; those that were left out are missing.
    pub all: BTreeMap<Subject, Samples>,
}

impl Report {
    /// Prints it on standard output.
    ///
    /// # Errors
    /// When a start had failed: figures of the others must not hide that.
    pub fn print(&self, json: bool) -> Result<()> {
        if json {
            println!("{:#}", self.to_json());
        } else {
            self.print_text();
        }
        let failures: usize = self.all.values().map(|s| s.failures().len()).sum();
        if failures == 0 {
            return Ok(());
        }
        Err(Error::Unexpected(format!(
            "{failures} starts failed; see the messages above"
        )))
    }

    fn to_json(&self) -> Value {
        let mut object = Map::new();
        for subject in Subject::ALL {
            let samples = self.all.get(&subject).map(Samples::to_json);
            object.insert(subject.name().into(), json!(samples));
        }
        object.insert("ratios".into(), self.ratios());
        object.insert("vmm_no_slower_than_qemu".into(), self.versus_qemu());
        object.insert("kvm_kind".into(), json!(self.kvm));
        object.insert("rounds".into(), json!(self.rounds));
        object.insert("machine".into(), json!(self.machine));
        object.insert("compared".into(), json!(self.notes()));
        object.insert("repeat".into(), json!(self.repeat()));
        Value::Object(object)
    }

    fn ratio(&self, (above, below): (Subject, Subject), figure: Figure) -> Option<f64> {
        let above = self.all.get(&above)?.median(figure)?;
        let below = self.all.get(&below)?.median(figure)?;
        (below > 0.0).then(|| rounded(above / below, 2))
    }

    /// Of the medians, by figure.
    fn ratios(&self) -> Value {
        let mut object = Map::new();
        for pair in RATIOS {
            let mut by_figure = Map::new();
            for figure in Figure::ALL {
                if let Some(ratio) = self.ratio(pair, figure) {
                    by_figure.insert(figure.key().into(), json!(ratio));
                }
            }
            let name = format!("{}_over_{}", pair.0.name(), pair.1.name());
            object.insert(name, Value::Object(by_figure));
        }
        Value::Object(object)
    }

    /// Whether the VMM's part of a cold start takes no longer than QEMU's, at each quartile.
    fn versus_qemu(&self) -> Value {
        let of = |subject: Subject| self.all.get(&subject)?.quartiles(Figure::VmmToGuestMs);
        match (of(Subject::Cold), of(Subject::QemuMicrovm)) {
            (Some(ours), Some(qemu)) => json!({
                "q1": ours.q1 <= qemu.q1,
                "median": ours.median <= qemu.median,
                "q3": ours.q3 <= qemu.q3,
            }),
            _ => Value::Null,
        }
    }

    /// How to repeat the measurement.
    fn repeat(&self) -> String {
        format!("scripts/dev bench start --runs {} --json", self.rounds)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "All virtual machines: 1 vCPU, 128 MiB, the same guest kernel and root image, the same \
             kernel parameters but for the devices; files in the page cache; one start at a time."
                .to_owned(),
            "QEMU: its microvm machine without ACPI, PCI, RTC and option ROMs, with a serial port, \
             virtio block and rng over MMIO. Bulkhead has vsock and virtio-fs besides; QEMU's need \
             a host module or another process and are left out."
                .to_owned(),
            "First guest instruction: the first time that a vCPU's thread runs the guest, seen by \
             KVM's tracepoints for both VMMs alike. QEMU's is its firmware's; vmm_to_kernel_ms is \
             the kernel's first for both. Four starts a round end there, for better quartiles. A \
             template's guest is idle when it's saved, and its vCPU halted until a timer or the \
             first request: its figure is the VMM's word that the vCPUs go on."
                .to_owned(),
            "template and cold, vmm_ and agent_ figures: bulkhead-vmm by its contract; container \
             figures: through the shim without containerd, `tail -f` of busybox, which prints one \
             line; runc runs the same bundle."
                .to_owned(),
        ];
        notes.push(if self.kvm == KvmKind::Emulated {
            "Knock: the first instruction of vsock_connect in the guest kernel, seen from outside, \
             for all alike. QEMU's agent figures are those of the knock; Bulkhead's cold ones are \
             taken when the knock has arrived."
                .to_owned()
        } else {
            "This KVM runs guest kernel mode natively: instructions can't be counted (null), and \
             QEMU's agent figure is the agent's first console line, just after its knock."
                .to_owned()
        });
        notes.push(
            "Memory is that of one machine alone: pages of the template's file that only one clone \
             has mapped count as private; bench density shows what clones share."
                .to_owned(),
        );
        notes.push(
            "The VMMs are watched by perf events while they run (each emulated instruction passes \
             two of them), all alike; runc isn't."
                .to_owned(),
        );
        notes
    }

    fn print_medians(&self) {
        print!("{:<26}", "median");
        for subject in Subject::ALL {
            print!(" {:>14}", subject.name());
        }
        println!();
        for figure in Figure::ALL {
            print!("{:<26}", figure.key());
            for subject in Subject::ALL {
                let median = self.all.get(&subject).and_then(|s| s.median(figure));
                let text = median.map_or_else(|| "-".to_owned(), |median| median.to_string());
                print!(" {text:>14}");
            }
            println!();
        }
    }

    fn print_quartiles(&self) {
        println!(
            "\n{:<40} {:>12} {:>12} {:>12}",
            "quartiles", "q1", "median", "q3"
        );
        for figure in COMPARED {
            for subject in Subject::ALL {
                if let Some(q) = self.all.get(&subject).and_then(|s| s.quartiles(figure)) {
                    let name = format!("{} {}", figure.key(), subject.name());
                    println!("{name:<40} {:>12} {:>12} {:>12}", q.q1, q.median, q.q3);
                }
            }
        }
    }

    fn print_text(&self) {
        println!("{}", self.machine.line());
        println!(
            "kvm_kind: {}",
            json!(self.kvm).as_str().unwrap_or("unknown")
        );
        println!();
        self.print_medians();
        self.print_quartiles();
        println!("\nratios of the medians");
        for pair in RATIOS {
            let each: Vec<String> = Figure::ALL
                .into_iter()
                .filter_map(|figure| {
                    Some(format!("{} {}", figure.key(), self.ratio(pair, figure)?))
                })
                .collect();
            if !each.is_empty() {
                println!("  {} / {}:", pair.0.name(), pair.1.name());
                println!("    {}", each.join(", "));
            }
        }
        if let Value::Object(quartiles) = self.versus_qemu() {
            println!(
                "VMM's part of a cold start no slower than QEMU's: {}",
                json!(quartiles)
            );
        }
        println!("\nwhat the figures are");
        for figure in Figure::ALL {
            println!("  {:<26} {}", figure.key(), figure.meaning());
        }
        println!("\nwhat was compared");
        for note in self.notes() {
            println!("  {note}");
        }
        println!("repeat with: {}", self.repeat());
    }
}
