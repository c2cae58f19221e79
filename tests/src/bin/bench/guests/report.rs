//! The result of a comparison of devices, for people and for programs.

use super::Subject;
use crate::host::Machine;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::error::{Error, Result};
use bulkhead_tests::stats::{Quartiles, rounded};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Something that is measured.
#[derive(Debug, PartialEq, Eq)]
pub struct Figure {
    /// In the JSON.
    pub key: &'static str,
    /// What it is.
    pub meaning: &'static str,
    /// Digits after the point.
    pub digits: u32,
    /// Bulkhead's must not be more than QEMU's.
    pub bounded: bool,
}

/// A figure.
pub const fn figure(
    key: &'static str,
    meaning: &'static str,
    digits: u32,
    bounded: bool,
) -> Figure {
    Figure {
        key,
        meaning,
        digits,
        bounded,
    }
}

/// One measurement: what could be told.
pub type Sample = Vec<(&'static Figure, Option<f64>)>;

/// What was measured in one way, by subject.
#[derive(Debug)]
pub struct Row {
    /// In the JSON.
    pub name: &'static str,
    /// What it is.
    pub meaning: String,
    /// Whether the bounds are for it.
    pub bounded: bool,
    values: BTreeMap<(Subject, &'static str), Vec<f64>>,
}

impl Row {
    /// An empty one.
    pub fn new(name: &'static str, meaning: String, bounded: bool) -> Self {
        Self {
            name,
            meaning,
            bounded,
            values: BTreeMap::new(),
        }
    }

    /// Adds a measurement.
    pub fn add(&mut self, subject: Subject, sample: Sample) {
        for (figure, value) in sample {
            if let Some(value) = value {
                let values = self.values.entry((subject, figure.key)).or_default();
                values.push(value);
            }
        }
    }

    fn quartiles(&self, subject: Subject, figure: &Figure) -> Option<Quartiles> {
        let values = self.values.get(&(subject, figure.key))?;
        Some(Quartiles::of(values)?.rounded(figure.digits))
    }

    /// Bulkhead's median by QEMU's.
    fn ratio(&self, figure: &Figure) -> Option<f64> {
        let median = |subject| {
            let values = self.values.get(&(subject, figure.key))?;
            Some(Quartiles::of(values)?.median)
        };
        let (ours, qemu) = (median(Subject::Bulkhead)?, median(Subject::QemuMicrovm)?);
        (qemu > 0.0).then(|| rounded(ours / qemu, 2))
    }

    /// Whether a bound holds; none where there is no such bound or nothing to compare.
    fn holds(&self, figure: &Figure) -> Option<bool> {
        let bound = self.bounded && figure.bounded;
        let ratio = self.ratio(figure)?;
        bound.then_some(ratio <= 1.0)
    }
}

/// Everything that was measured.
pub struct Report {
    /// On what.
    pub machine: Machine,
    /// How guest kernel mode runs.
    pub kvm: KvmKind,
    /// All figures, in the order in which they are printed.
    pub figures: &'static [Figure],
    /// All that was measured, in the same order.
    pub rows: Vec<Row>,
    /// What was compared.
    pub notes: Vec<String>,
    /// How to repeat it.
    pub repeat: String,
    /// What went wrong.
    pub failures: Vec<String>,
}

impl Report {
    /// Prints it on standard output.
    ///
    /// # Errors
    /// When something had failed: figures of the rest must not hide that.
    pub fn print(&self, json: bool) -> Result<()> {
        match json {
            true => println!("{:#}", self.to_json()),
            false => self.print_text(),
        }
        if self.failures.is_empty() {
            return Ok(());
        }
        let failures = self.failures.len();
        let message = format!("{failures} measurements failed; see the messages above");
        Err(Error::Unexpected(message))
    }

    fn to_json(&self) -> Value {
        let rows: Map<String, Value> = self
            .rows
            .iter()
            .map(|row| (row.name.to_owned(), self.row_json(row)))
            .collect();
        let meanings: Map<String, Value> = self
            .figures
            .iter()
            .map(|figure| (figure.key.to_owned(), json!(figure.meaning)))
            .collect();
        json!({
            "cases": rows,
            "figures": meanings,
            "all_bounds_hold": self.broken().is_empty(),
            "kvm_kind": self.kvm,
            "machine": self.machine,
            "compared": self.notes,
            "failures": self.failures,
            "repeat": format!("{} --json", self.repeat),
        })
    }

    fn row_json(&self, row: &Row) -> Value {
        let mut object = Map::new();
        object.insert("what".into(), json!(row.meaning));
        for subject in Subject::ALL {
            let figures = self.figures.iter().filter_map(|figure| {
                let found = row.quartiles(subject, figure)?;
                let three = [found.q1, found.median, found.q3];
                let entry = json!({
                    "median": number(found.median, figure.digits),
                    "quartiles": three.map(|value| number(value, figure.digits)),
                });
                Some((figure.key.to_owned(), entry))
            });
            let figures: Map<String, Value> = figures.collect();
            if !figures.is_empty() {
                object.insert(subject.name().into(), Value::Object(figures));
            }
        }
        let ratios = self.figures.iter().filter_map(|figure| {
            let ratio = row.ratio(figure)?;
            let entry = match row.holds(figure) {
                Some(holds) => json!({ "ratio": ratio, "at_most": 1, "holds": holds }),
                None => json!({ "ratio": ratio }),
            };
            Some((figure.key.to_owned(), entry))
        });
        let ratios: Map<String, Value> = ratios.collect();
        object.insert("bulkhead_over_qemu".into(), Value::Object(ratios));
        Value::Object(object)
    }

    /// Bounds that don't hold.
    fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        for row in &self.rows {
            for figure in self.figures {
                if row.holds(figure) == Some(false) {
                    let ratio = row.ratio(figure).unwrap_or_default();
                    broken.push(format!("{} of {}: {ratio}", figure.key, row.name));
                }
            }
        }
        broken
    }

    fn print_text(&self) {
        println!("{}", self.machine.line());
        println!(
            "kvm_kind: {}",
            json!(self.kvm).as_str().unwrap_or("unknown")
        );
        for row in &self.rows {
            println!("\n{}: {}", row.name, row.meaning);
            print!("  {:<28}", "median (quartiles)");
            for subject in Subject::ALL {
                print!(" {:>28}", subject.name());
            }
            println!(" {:>8}", "/ QEMU");
            for figure in self.figures {
                self.print_figure(row, figure);
            }
        }
        println!("\nwhat the figures are");
        for figure in self.figures {
            println!("  {:<28} {}", figure.key, figure.meaning);
        }
        println!("\nwhat was compared");
        for note in &self.notes {
            println!("  {note}");
        }
        let broken = self.broken();
        match broken.is_empty() {
            true => println!("\nall bounds hold (no more than QEMU's)"),
            false => println!("\nmore than QEMU's: {}", broken.join("; ")),
        }
        println!("repeat with: {}", self.repeat);
    }

    fn print_figure(&self, row: &Row, figure: &Figure) {
        let cells = Subject::ALL.map(|subject| row.quartiles(subject, figure));
        if cells.iter().all(Option::is_none) {
            return;
        }
        print!("  {:<28}", figure.key);
        for cell in cells {
            let text = cell.map_or_else(
                || "-".to_owned(),
                |found| format!("{} ({}, {})", found.median, found.q1, found.q3),
            );
            print!(" {text:>28}");
        }
        let ratio = row.ratio(figure).map(|ratio| ratio.to_string());
        let mark = if row.holds(figure) == Some(false) {
            " !"
        } else {
            ""
        };
        println!(" {:>8}{mark}", ratio.unwrap_or_default());
    }
}

fn number(value: f64, digits: u32) -> Value {
    match digits {
        0 => json!(value as i64),
        digits => json!(rounded(value, digits)),
    }
}
