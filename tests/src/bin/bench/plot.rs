//! The picture of the phases of a start, from the bench's JSON.

use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::plot;
use std::path::PathBuf;

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench start --json >start.json\n  \
    scripts/dev bench plot start.json docs/bench-start.svg")]
pub struct Arguments {
    /// What `bench start --json` has printed.
    input: PathBuf,
    /// The SVG file to write.
    output: PathBuf,
}

/// Draws it.
///
/// # Errors
/// When the input can't be read or holds no figures, or the output can't be written.
pub fn draw(arguments: &Arguments) -> Result<()> {
    let Arguments { input, output } = arguments;
    let text = std::fs::read_to_string(input).context(|| format!("read {}", input.display()))?;
    let bench = serde_json::from_str(&text)
        .map_err(|error| Error::Unexpected(format!("{}: {error}", input.display())))?;
    let drawn = plot::svg(&bench)?;
    std::fs::write(output, drawn).context(|| format!("write {}", output.display()))
}
