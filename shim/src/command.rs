//! What the commands have in common that work with folders of things kept for later starts.

use bulkhead_sandbox::config::{Config, ConfigError, ConfigSource};
use bulkhead_sandbox::layers::LayerError;
use bulkhead_sandbox::sizing::SizeError;
use bulkhead_sandbox::template::{Key, TemplateError};
use clap::Args;
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Fewest digits of a key that name an entry.
const MIN_PREFIX: usize = 4;

/// What every one of these commands takes.
#[derive(Debug, Args)]
pub struct Output {
    /// Prints JSON instead of text.
    #[arg(long)]
    pub json: bool,
    /// Uses this configuration file instead of the one that a shim would find.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Why one of these commands failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The configuration can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The machine doesn't fit this host.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The template or the folder can't be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The layer or the folder can't be used.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// No entry, or more than one, is meant.
    #[error("{problem}; `bulkhead {what} list` shows all")]
    Key {
        /// The kind of entry, which is the command's name.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// Output failed, or the runtime can't be made.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Output failed.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
}

pub(crate) type Result<T> = std::result::Result<T, CommandError>;

pub(crate) fn find_config(output: &Output) -> Result<Config> {
    let source = ConfigSource {
        path: output.config.clone(),
        body: None,
    };
    Ok(Config::find(&source)?)
}

pub(crate) fn render<T: Serialize>(
    output: &Output,
    value: &T,
    text: impl Fn(&T) -> String,
) -> Result<String> {
    if !output.json {
        return Ok(text(value));
    }
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// The one of `all` whose key begins with `prefix`.
pub(crate) fn pick<'a, T>(
    what: &'static str,
    all: &'a [T],
    prefix: &str,
    key: impl Fn(&T) -> &Key,
) -> Result<&'a T> {
    let wrong = |problem| Err(CommandError::Key { what, problem });
    if prefix.len() < MIN_PREFIX {
        return wrong(format!(
            "{prefix:?} is too short for a key: give {MIN_PREFIX} digits"
        ));
    }
    let mut found = all
        .iter()
        .filter(|one| key(one).as_str().starts_with(prefix));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => wrong(format!("no {what} has a key that begins with {prefix:?}")),
        (Some(_), Some(_)) => wrong(format!(
            "more than one {what} has a key that begins with {prefix:?}"
        )),
    }
}

/// There is none at all, and so not this one.
pub(crate) fn none(what: &'static str, key: &str) -> CommandError {
    let problem = format!("there is no {what} {key:?}, nor any other");
    CommandError::Key { what, problem }
}

/// How long ago a moment was, in the largest unit that fits.
pub(crate) fn age(at: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let seconds = now.saturating_sub(at);
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86_400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// The first line of a listing: where the entries are, whether they are in use, and what they take.
pub fn heading(folder: &Path, enabled: bool, bytes: u64, limit: u64) -> String {
    let state = match enabled {
        true => "in use",
        false => "switched off in the configuration",
    };
    let (mib, limit) = (bytes.div_ceil(1 << 20), limit >> 20);
    format!("{}: {state}, {mib} of {limit} MiB\n", folder.display())
}

/// The keys of what was removed, one a line.
pub fn removed_text<'a>(keys: impl IntoIterator<Item = &'a Key>) -> String {
    let keys = keys.into_iter();
    keys.map(|key| format!("{}\n", key.short())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_in_the_largest_unit() {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(age(now).ends_with(" s ago"));
        assert_eq!(age(now - 130), "2 min ago");
        assert_eq!(age(now - 7300), "2 h ago");
        assert_eq!(age(now - 200_000), "2 d ago");
        assert_eq!(age(u64::MAX), "0 s ago");
    }
}
