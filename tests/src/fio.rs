//! What fio says in JSON (`--output-format=json`), as far as it is needed.

pub mod jobs;

use crate::error::{Error, Result};
use serde::Deserialize;

/// What one job has done in one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transfer {
    /// Bytes transferred.
    pub bytes: u64,
    /// Requests made.
    pub requests: u64,
    /// Milliseconds from the first request to the last one's end.
    pub ms: f64,
    /// Microseconds of a request on average, from its making to its end.
    pub latency_us: f64,
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    jobname: String,
    error: i32,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    io_bytes: u64,
    total_ios: u64,
    /// Milliseconds.
    runtime: u64,
    lat_ns: Nanoseconds,
}

#[derive(Deserialize)]
struct Nanoseconds {
    mean: f64,
}

/// Characters of fio's output in errors.
const SHOWN: usize = 300;

/// The jobs by their names, in their order; each reads or writes but not both.
///
/// # Errors
/// When the text is something else, or a job failed.
pub fn parse(text: &str) -> Result<Vec<(String, Transfer)>> {
    // Its JSON is long.
    let refuse = |why: String| {
        let start: String = text.chars().take(SHOWN).collect();
        Error::Unexpected(format!("fio: {why}; it printed {start:?}"))
    };
    // Warnings may come first.
    let json = text.find('{').map_or("", |at| &text[at..]);
    let output: Output =
        serde_json::from_str(json).map_err(|error| refuse(format!("not its JSON: {error}")))?;
    let transfers = output.jobs.into_iter().map(|job| {
        let transfer = transfer(&job).map_err(|why| refuse(format!("{}: {why}", job.jobname)))?;
        Ok((job.jobname, transfer))
    });
    transfers.collect()
}

fn transfer(job: &Job) -> std::result::Result<Transfer, String> {
    if job.error != 0 {
        let cause = std::io::Error::from_raw_os_error(job.error);
        return Err(format!("the job failed: {cause}"));
    }
    let direction = match (job.read.total_ios, job.write.total_ios) {
        (1.., 0) => &job.read,
        (0, 1..) => &job.write,
        (reads, writes) => return Err(format!("{reads} reads and {writes} writes")),
    };
    Ok(Transfer {
        bytes: direction.io_bytes,
        requests: direction.total_ios,
        ms: direction.runtime as f64,
        latency_us: direction.lat_ns.mean / 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn direction(requests: u64) -> Value {
        json!({
            "io_bytes": requests * 4096, "total_ios": requests, "runtime": requests * 27, "bw": 1,
            "lat_ns": { "min": 1, "max": 2, "mean": 1500.0 },
        })
    }

    fn job(reads: u64, writes: u64, error: i32) -> Value {
        json!({ "jobname": "x", "error": error, "read": direction(reads), "write": direction(writes), "trim": {} })
    }

    #[test]
    fn the_direction_that_was_used_is_told() {
        let expected = Transfer {
            bytes: 16_384,
            requests: 4,
            ms: 108.0,
            latency_us: 1.5,
        };
        let jobs = [job(4, 0, 0), job(0, 4, 0)];
        let text = format!(
            "fio: a warning\n{}",
            json!({ "fio version": "fio-3.33", "jobs": jobs })
        );
        let expected = ("x".to_owned(), expected);
        assert_eq!(parse(&text).unwrap(), [expected.clone(), expected]);
        assert_eq!(parse(r#"{"jobs":[]}"#).unwrap(), []);
    }

    #[test]
    fn all_else_is_an_error() {
        let of = |jobs: Vec<Value>| json!({ "jobs": jobs }).to_string();
        for (text, why) in [
            (String::new(), "not its JSON"),
            ("fio: no such file".into(), "not its JSON"),
            ("{}".into(), "not its JSON"),
            (
                of(vec![job(1, 0, 0), job(0, 0, 0)]),
                "x: 0 reads and 0 writes",
            ),
            (of(vec![job(3, 2, 0)]), "3 reads and 2 writes"),
            (of(vec![job(3, 0, 5)]), "Input/output error"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
