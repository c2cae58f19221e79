//! What iperf3 says in JSON (`--json`), as far as it is needed.

use crate::error::{Error, Result};
use serde::Deserialize;

/// What one TCP stream has carried, as its receiver counts it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Carried {
    /// Bytes.
    pub bytes: u64,
    /// Seconds from the first to the last.
    pub seconds: f64,
}

#[derive(Deserialize)]
struct Output {
    error: Option<String>,
    end: Option<End>,
}

#[derive(Deserialize)]
struct End {
    sum_sent: Option<Sum>,
    sum_received: Option<Sum>,
}

#[derive(Deserialize)]
struct Sum {
    bytes: u64,
    seconds: f64,
}

/// What a client tells of its test: of all streams together. The server ends a test of so many
/// bytes as soon as its client says that it has sent them, so what the sender counts is the amount.
///
/// # Errors
/// When the text is something else, or the test failed.
pub fn parse(text: &str) -> Result<Carried> {
    let refuse = |why: &str| Error::Unexpected(format!("iperf3: {why}; it printed {text:?}"));
    let output: Output =
        serde_json::from_str(text).map_err(|error| refuse(&format!("not its JSON: {error}")))?;
    if let Some(error) = output.error {
        return Err(refuse(&error));
    }
    let (sent, received) = output
        .end
        .and_then(|end| Some((end.sum_sent?, end.sum_received?)))
        .ok_or_else(|| refuse("no sums at the end"))?;
    if sent.bytes == 0 {
        return Err(refuse("nothing was sent"));
    }
    Ok(Carried {
        bytes: sent.bytes,
        seconds: sent.seconds.max(received.seconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sums_are_taken_from_the_end() {
        let sum = |seconds: f64| json!({ "bytes": 1_048_576, "seconds": seconds, "bits_per_second": 1e6 });
        let text = json!({
            "start": { "version": "iperf 3.12" }, "intervals": [],
            "end": { "streams": [], "sum_sent": sum(7.5), "sum_received": sum(8.0) },
        })
        .to_string();
        let expected = Carried {
            bytes: 1_048_576,
            seconds: 8.0,
        };
        assert_eq!(parse(&text).unwrap(), expected);
    }

    #[test]
    fn all_else_is_an_error() {
        let none = json!({ "bytes": 0, "seconds": 0.0 });
        for (text, why) in [
            ("", "not its JSON"),
            (
                r#"{"start":{},"end":{},"error":"unable to connect"}"#,
                "unable to connect",
            ),
            (r#"{"start":{},"end":{}}"#, "no sums"),
            (r#"{"start":{}}"#, "no sums"),
            (
                &json!({ "end": { "sum_sent": none, "sum_received": none } }).to_string(),
                "nothing was sent",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
