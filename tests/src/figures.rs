//! The figures of a start, as `bulkhead-bench start` takes them: their names, and medians and
//! quartiles of many.

use crate::stats::{Quartiles, rounded};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// What is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Subject {
    /// Bulkhead, continuing a template.
    Template,
    /// Bulkhead, booting the guest kernel.
    Cold,
    /// QEMU's microvm machine with the same kernel and root image.
    QemuMicrovm,
    /// runc: no virtual machine.
    Runc,
}

impl Subject {
    /// In the order of the output.
    pub const ALL: [Self; 4] = [Self::Template, Self::Cold, Self::QemuMicrovm, Self::Runc];

    /// Its key in JSON and its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::Cold => "cold",
            Self::QemuMicrovm => "qemu_microvm",
            Self::Runc => "runc",
        }
    }
}

/// A figure of one start, with its key in JSON; [`Figure::meaning`] says what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Figure {
    /// `vmm_to_guest_ms`
    VmmToGuestMs,
    /// `vmm_to_kernel_ms`
    VmmToKernelMs,
    /// `vmm_to_knock_ms`
    VmmToKnockMs,
    /// `vmm_to_agent_ms`
    VmmToAgentMs,
    /// `vmm_to_first_exec_ms`
    VmmToFirstExecMs,
    /// `first_output_ms`
    FirstOutputMs,
    /// `command_to_output_ms`
    CommandToOutputMs,
    /// `knock_instructions`
    KnockInstructions,
    /// `agent_instructions`
    AgentInstructions,
    /// `first_exec_instructions`
    FirstExecInstructions,
    /// `private_kib`
    PrivateKib,
    /// `shared_kib`
    SharedKib,
    /// `agent_private_kib`
    AgentPrivateKib,
    /// `agent_shared_kib`
    AgentSharedKib,
    /// `shim_private_kib`
    ShimPrivateKib,
}

impl Figure {
    /// In the order of the output.
    pub const ALL: [Self; 15] = [
        Self::VmmToGuestMs,
        Self::VmmToKernelMs,
        Self::VmmToKnockMs,
        Self::VmmToAgentMs,
        Self::VmmToFirstExecMs,
        Self::FirstOutputMs,
        Self::CommandToOutputMs,
        Self::KnockInstructions,
        Self::AgentInstructions,
        Self::FirstExecInstructions,
        Self::PrivateKib,
        Self::SharedKib,
        Self::AgentPrivateKib,
        Self::AgentSharedKib,
        Self::ShimPrivateKib,
    ];

    /// Its key in JSON.
    pub fn key(self) -> &'static str {
        self.names().0
    }

    /// What it is.
    pub fn meaning(self) -> &'static str {
        self.names().1
    }

    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::VmmToGuestMs => (
                "vmm_to_guest_ms",
                "VMM's process start to the first guest instruction",
            ),
            Self::VmmToKernelMs => (
                "vmm_to_kernel_ms",
                "the same to the guest kernel's first instruction (QEMU runs firmware before)",
            ),
            Self::VmmToKnockMs => (
                "vmm_to_knock_ms",
                "the same to the agent's knock, seen in the guest from outside (see compared)",
            ),
            Self::VmmToAgentMs => (
                "vmm_to_agent_ms",
                "the same to the agent ready (cold) or acknowledging its identity (template)",
            ),
            Self::VmmToFirstExecMs => (
                "vmm_to_first_exec_ms",
                "the same to the container's first instruction",
            ),
            Self::FirstOutputMs => (
                "first_output_ms",
                "the same to the container's first output; runc: from runc's process start",
            ),
            Self::CommandToOutputMs => (
                "command_to_output_ms",
                "start of the shim's command, or of runc's, to the container's first output",
            ),
            Self::KnockInstructions => (
                "knock_instructions",
                "guest instructions to the agent's knock",
            ),
            Self::AgentInstructions => (
                "agent_instructions",
                "guest instructions to the agent ready or acknowledging",
            ),
            Self::FirstExecInstructions => (
                "first_exec_instructions",
                "guest instructions to the container's first instruction",
            ),
            Self::PrivateKib => (
                "private_kib",
                "VMM's private memory, container running (QEMU: at the knock; runc: its processes)",
            ),
            Self::SharedKib => ("shared_kib", "its shared memory at the same moment"),
            Self::AgentPrivateKib => (
                "agent_private_kib",
                "VMM's private memory once the agent is ready",
            ),
            Self::AgentSharedKib => ("agent_shared_kib", "its shared memory at the same moment"),
            Self::ShimPrivateKib => (
                "shim_private_kib",
                "the shim's private memory, container running",
            ),
        }
    }

    fn digits(self) -> u32 {
        if self.key().ends_with("_ms") { 2 } else { 0 }
    }
}

/// The figures of one start; one that is missing can't be told here.
pub type Sample = BTreeMap<Figure, f64>;

/// All starts of one subject.
#[derive(Debug, Default)]
pub struct Samples {
    starts: Vec<Sample>,
    /// Starts that were ended at the first guest instruction.
    short: Vec<Sample>,
    failures: Vec<String>,
}

impl Samples {
    /// Adds a start or its failure.
    pub fn add(&mut self, start: crate::Result<Sample>) {
        match start {
            Ok(sample) => self.starts.push(sample),
            Err(error) => self.failures.push(error.to_string()),
        }
    }

    /// Adds a start that went no further than the first guest instruction, or its failure.
    pub fn add_short(&mut self, start: crate::Result<Sample>) {
        match start {
            Ok(sample) => self.short.push(sample),
            Err(error) => self.failures.push(error.to_string()),
        }
    }

    /// Number of starts that succeeded.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// What went wrong.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Quartiles of one figure; `None` when no start could tell it.
    pub fn quartiles(&self, figure: Figure) -> Option<Quartiles> {
        let values: Vec<f64> = self
            .starts
            .iter()
            .chain(&self.short)
            .filter_map(|sample| sample.get(&figure).copied())
            .collect();
        Some(Quartiles::of(&values)?.rounded(figure.digits()))
    }

    /// The median of one figure.
    pub fn median(&self, figure: Figure) -> Option<f64> {
        Some(self.quartiles(figure)?.median)
    }

    /// Medians by key, null for those that nobody could tell, then quartiles, the number of starts
    /// and the failures.
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        let mut all = Map::new();
        for figure in Figure::ALL {
            let quartiles = self.quartiles(figure);
            let number = |value: f64| match figure.digits() {
                0 => json!(value as u64),
                digits => json!(rounded(value, digits)),
            };
            let median = quartiles.map(|quartiles| number(quartiles.median));
            object.insert(figure.key().into(), json!(median));
            if let Some(Quartiles { q1, median, q3 }) = quartiles {
                let three = json!([number(q1), number(median), number(q3)]);
                all.insert(figure.key().into(), three);
            }
        }
        object.insert("quartiles".into(), Value::Object(all));
        object.insert("starts".into(), json!(self.count()));
        object.insert("short_starts".into(), json!(self.short.len()));
        object.insert("failures".into(), json!(self.failures));
        Value::Object(object)
    }
}

/// Milliseconds between two moments in nanoseconds.
pub fn ms_between(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn sample(ms: f64) -> Sample {
        Sample::from([
            (Figure::FirstOutputMs, ms),
            (Figure::PrivateKib, ms * 100.4),
        ])
    }

    #[test]
    fn medians_have_their_keys_and_missing_ones_are_null() {
        let mut samples = Samples::default();
        for ms in [3.0, 1.0, 2.0] {
            samples.add(Ok(sample(ms)));
        }
        let json = samples.to_json();
        assert_eq!(json["first_output_ms"], 2.0);
        assert_eq!(json["private_kib"], 201, "a whole number");
        assert_eq!(json["quartiles"]["first_output_ms"], json!([1.5, 2.0, 2.5]));
        assert_eq!(json["starts"], 3);
        for key in [
            "vmm_to_guest_ms",
            "vmm_to_agent_ms",
            "agent_instructions",
            "first_exec_instructions",
            "shared_kib",
        ] {
            assert_eq!(json.get(key), Some(&Value::Null), "{key}");
        }
    }

    #[test]
    fn short_starts_count_only_for_what_they_tell() {
        let mut samples = Samples::default();
        samples.add(Ok(Sample::from([(Figure::VmmToGuestMs, 4.0)])));
        samples.add_short(Ok(Sample::from([(Figure::VmmToGuestMs, 2.0)])));
        assert_eq!(samples.median(Figure::VmmToGuestMs), Some(3.0));
        assert_eq!(samples.count(), 1);
    }

    #[test]
    fn a_failure_is_kept_and_counts_for_no_median() {
        let mut samples = Samples::default();
        samples.add(Ok(sample(5.0)));
        samples.add(Err(Error::Unexpected("it broke".into())));
        assert_eq!(samples.to_json()["failures"], json!(["it broke"]));
        assert_eq!(samples.median(Figure::FirstOutputMs), Some(5.0));
    }

    #[test]
    fn keys_are_distinct() {
        let keys: std::collections::HashSet<_> = Figure::ALL.iter().map(|f| f.key()).collect();
        assert_eq!(keys.len(), Figure::ALL.len());
    }
}
