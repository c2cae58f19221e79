//! Lines for each check, and the totals.

use std::cell::RefCell;
use std::time::Duration;

/// Last line of a scenario that ran to its end.
pub const END_MARK: &str = "scenario ended";

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps panic messages for the report instead of printing them in the middle of it.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|info| {
        let message = info.to_string();
        // A panic of another thread is nobody's check.
        let kept = LAST_PANIC.try_with(|last| last.replace(message.clone()));
        if kept.is_err() || std::thread::current().name() != Some("main") {
            eprintln!("{message}");
        }
    }));
}

/// Forgets the last panic.
pub fn clear_panic() {
    LAST_PANIC.with(|last| last.borrow_mut().clear());
}

/// The last panic's message.
pub fn take_panic() -> String {
    LAST_PANIC.with(RefCell::take)
}

/// Prints one check's result.
pub fn check_done(scenario: &str, check: &str, passed: bool, took: Duration) {
    let result = if passed { "ok" } else { "FAILED" };
    println!(
        "test {scenario}::{check} ... {result} ({:.1} s)",
        took.as_secs_f64()
    );
    if !passed {
        for line in take_panic().lines() {
            println!("    {line}");
        }
    }
}

/// Counts of checks.
#[derive(Debug, Default)]
pub struct Totals {
    /// Checks that held.
    pub passed: u32,
    /// Checks that did not.
    pub failed: u32,
    /// Scenarios that could not run here.
    pub skipped: u32,
    skip_reasons: Vec<String>,
    failures: Vec<String>,
}

impl Totals {
    /// Adds another's counts.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.skip_reasons.extend(other.skip_reasons);
        self.failures.extend(other.failures);
    }

    /// Counts a line of a scenario's output.
    pub fn count_line(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test ") else {
            return;
        };
        let Some((name, result)) = rest.rsplit_once(" ... ") else {
            return;
        };
        if result.starts_with("ok") {
            self.passed += 1;
        } else if result.starts_with("FAILED") {
            self.fail(name.to_owned());
        }
    }

    /// Counts a failure.
    pub fn fail(&mut self, name: String) {
        self.failed += 1;
        self.failures.push(name);
    }

    /// Prints failures, skips and the sums.
    pub fn print(&self) {
        for failure in &self.failures {
            println!("FAILED: {failure}");
        }
        if self.skipped > 0 {
            println!("SKIPPED {} scenarios:", self.skipped);
            self.skip_reasons
                .iter()
                .for_each(|reason| println!("    {reason}"));
        }
        println!(
            "test result: {} passed; {} failed; {} skipped",
            self.passed, self.failed, self.skipped
        );
    }
}

/// Reports a scenario that can't run here.
pub fn skipped(scenario: &str, reason: &str) -> Totals {
    println!("test {scenario} ... SKIPPED: {reason}");
    Totals {
        skipped: 1,
        skip_reasons: vec![format!("{scenario}: {reason}")],
        ..Totals::default()
    }
}
