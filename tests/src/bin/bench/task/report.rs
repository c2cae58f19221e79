//! The result, for people and for programs.

use super::{Figure, Values};
use crate::host::Machine;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::stats::rounded;
use serde_json::{Map, Value, json};

/// Everything that was measured.
pub struct Report {
    /// In a microVM.
    pub bulkhead: Values,
    /// Without one; none where runc is missing.
    pub runc: Option<Values>,
    /// How guest kernel mode runs.
    pub kvm: KvmKind,
    /// On what.
    pub machine: Machine,
    /// How to repeat it.
    pub arguments: String,
}

const NOTES: [&str; 4] = [
    "Each round is the life of one more container in a pod that runs, `sleep` of busybox without \
     streams, which shares network, ipc and uts with the pod: create, start, exec of `true`, \
     SIGKILL, delete. The pod's first container, which uses what the template made ahead, is left \
     out. Bulkhead's calls go over one connection to the shim; runc is a process for each.",
    "Instructions: guest kernel instructions that KVM emulates, counted on the vCPU's thread in \
     rounds of their own, which are not timed; null where KVM runs guest kernel mode natively. \
     A program's first instruction is where the guest kernel's execve ends (start_thread).",
    "exec_ms and exec_to_end_instructions: from Exec to Delete's answer; exec_instructions: to the \
     program's first instruction.",
    "Shim memory: Private_Clean and Private_Dirty of /proc/PID/smaps_rollup, two seconds after the \
     last call, all the rounds before included; per container: the growth by further ones, divided \
     by their number.",
];

impl Report {
    /// Prints it on standard output.
    pub fn print(&self, json: bool) {
        if json {
            println!("{:#}", self.to_json());
        } else {
            self.print_text();
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "bulkhead": subject(&self.bulkhead),
            "runc": self.runc.as_ref().map(subject),
            "bounds": bounds(&self.bulkhead),
            "kvm_kind": self.kvm,
            "machine": self.machine,
            "compared": NOTES,
            "repeat": format!("{} --json", self.arguments),
        })
    }

    fn print_text(&self) {
        println!("{}", self.machine.line());
        println!(
            "kvm_kind: {}\n",
            json!(self.kvm).as_str().unwrap_or("unknown")
        );
        println!(
            "{:<32} {:>12} {:>12} {:>12}",
            "median", "bulkhead", "runc", "bound"
        );
        for figure in Figure::ALL {
            let text = |values: Option<&Values>| {
                let median = values.and_then(|values| values.quartiles(figure));
                median.map_or_else(|| "-".to_owned(), |found| found.median.to_string())
            };
            println!(
                "{:<32} {:>12} {:>12} {:>12}",
                figure.key(),
                text(Some(&self.bulkhead)),
                text(self.runc.as_ref()),
                figure
                    .bound()
                    .map_or_else(String::new, |bound| bound.to_string()),
            );
        }
        println!("\nwhat was compared");
        for note in NOTES {
            println!("  {note}");
        }
        println!("repeat with: {}", self.arguments);
    }
}

fn number(figure: Figure, value: f64) -> Value {
    match figure.digits() {
        0 => json!(value as u64),
        digits => json!(rounded(value, digits)),
    }
}

/// Medians by key, null for what can't be told, then the quartiles.
fn subject(values: &Values) -> Value {
    let mut object = Map::new();
    let mut all = Map::new();
    for figure in Figure::ALL {
        let quartiles = values.quartiles(figure);
        let median = quartiles.map(|found| number(figure, found.median));
        object.insert(figure.key().into(), json!(median));
        if let Some(found) = quartiles {
            let three = [found.q1, found.median, found.q3].map(|value| number(figure, value));
            all.insert(figure.key().into(), json!(three));
        }
    }
    object.insert("quartiles".into(), Value::Object(all));
    Value::Object(object)
}

/// By key: what is allowed, and whether it holds; null where the figure can't be told.
fn bounds(values: &Values) -> Value {
    let mut object = Map::new();
    for figure in Figure::ALL {
        let Some(bound) = figure.bound() else {
            continue;
        };
        let holds = values.quartiles(figure).map(|found| found.median <= bound);
        let entry = json!({ "at_most": bound as u64, "holds": holds });
        object.insert(figure.key().into(), entry);
    }
    Value::Object(object)
}
