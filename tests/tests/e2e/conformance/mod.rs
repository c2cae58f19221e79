//! The OCI runtime spec, case by case: each container runs under runc first, then under Bulkhead,
//! with the same root file system and configuration.
//!
//! What the spec demands of each is written down in `cases.rs`; Bulkhead must do that. Where runc
//! does otherwise, `docs/conformance.md` says so and why.

mod cases;
mod runner;

use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use cases::Case;
use runner::{Outcome, Runtime};
use std::collections::BTreeMap;

/// The list of differences, as users read it.
const DOCUMENT: &str = include_str!("../../../../docs/conformance.md");

/// Where something was seen to be otherwise than the spec demands.
#[derive(Debug, Default)]
struct Findings {
    /// By `case: what`: what was seen instead.
    otherwise: BTreeMap<String, String>,
    /// Values compared.
    compared: usize,
}

impl Findings {
    fn compare(&mut self, case: &Case, outcome: &Outcome) {
        for (what, expected) in case.expected {
            self.compared += 1;
            let seen = outcome.value(what);
            if seen.as_deref() != Some(*expected) {
                let seen = seen.unwrap_or_else(|| outcome.whole());
                self.otherwise
                    .insert(format!("{}: {what}", case.name), seen);
            }
        }
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let mut runc = Findings::default();
    for case in cases::ALL {
        if runner::runc_is_there() {
            checks.check(
                &format!("{}: runc runs it or refuses it", case.name),
                || {
                    runc.compare(case, &runner::run(artifacts, case, Runtime::Runc));
                },
            );
        }
        checks.check(
            &format!("{}: as {} demands", case.name, case.section),
            || {
                let outcome = runner::run(artifacts, case, Runtime::Bulkhead);
                let mut ours = Findings::default();
                ours.compare(case, &outcome);
                assert!(
                    ours.otherwise.is_empty(),
                    "{:#?}\n{outcome:?}",
                    ours.otherwise
                );
            },
        );
    }
    checks.check("what runc does otherwise is listed with its reason", || {
        println!(
            "runc: {} of {} values are otherwise",
            runc.otherwise.len(),
            runc.compared
        );
        let listed = |finding: &str| {
            let (case, what) = finding.split_once(": ").unwrap_or((finding, ""));
            let mut of_case = DOCUMENT
                .lines()
                .filter(|line| line.starts_with(&format!("| {case} |")));
            of_case.any(|line| line.contains(&format!("`{what}`")))
        };
        let unlisted: Vec<_> = runc
            .otherwise
            .iter()
            .filter(|(finding, _)| !listed(finding))
            .collect();
        assert!(
            unlisted.is_empty(),
            "not in docs/conformance.md: {unlisted:#?}"
        );
    });
}
