//! `bulkhead layer`: looks at the layers of images that were converted, removes some.
//!
//! With `--json`, `list` prints one object. The keys are stable; later versions may add some:
//!
//! | key | value |
//! |---|---|
//! | `layer_dir`, `enabled`, `limit_bytes` | from the configuration |
//! | `bytes` | what all images together take on the disk |
//! | `layers[].key` | 64 hexadecimal digits |
//! | `layers[].bytes` | what it takes on the disk |
//! | `layers[].last_used` | when a container was last created with it, in seconds since the epoch |
//! | `layers[].in_use` | whether a container has it |

use crate::command::{self, Output, Result, age, find_config, render};
use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::layers::{Entry, LayerError, Store};
use bulkhead_sandbox::template::Key;
use clap::Subcommand;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;

const EXAMPLES_LIST: &str = "Examples:\n  bulkhead layer list\n  bulkhead layer list --json";
const EXAMPLES_RM: &str = "Examples:\n  bulkhead layer rm 3f2a9c\n  bulkhead layer rm --unused";

/// What to do with converted layers.
#[derive(Debug, Subcommand)]
pub enum LayerCommand {
    /// Lists the converted layers, the least recently used first.
    #[command(after_help = EXAMPLES_LIST)]
    List(Output),
    /// Removes converted layers that no container has; they are made again when one needs them.
    #[command(after_help = EXAMPLES_RM)]
    Rm {
        /// The first digits of their keys, 4 at least.
        #[arg(required_unless_present = "unused")]
        keys: Vec<String>,
        /// Removes all that no container has, and what conversions that were cut short have left.
        #[arg(long, conflicts_with = "keys")]
        unused: bool,
        /// How to print.
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Serialize)]
struct Listing {
    layer_dir: PathBuf,
    enabled: bool,
    limit_bytes: u64,
    bytes: u64,
    layers: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Removed {
    removed: Vec<Key>,
}

/// Runs one command.
///
/// # Errors
/// When it can't do what it was asked to.
pub fn run(command: LayerCommand) -> Result<()> {
    let text = match command {
        LayerCommand::List(output) => {
            let listing = list(&find_config(&output)?)?;
            render(&output, &listing, list_text)?
        }
        LayerCommand::Rm {
            keys,
            unused,
            output,
        } => {
            let removed = remove(&find_config(&output)?, &keys, unused)?;
            render(&output, &removed, |removed| {
                command::removed_text(&removed.removed)
            })?
        }
    };
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}

fn list(config: &Config) -> Result<Listing> {
    let layers = match Store::existing(&config.layer_dir)? {
        Some(store) => store.list()?,
        None => Vec::new(),
    };
    Ok(Listing {
        layer_dir: config.layer_dir.clone(),
        enabled: config.convert_layers,
        limit_bytes: u64::from(config.layer_limit_mib) << 20,
        bytes: layers.iter().map(|one| one.bytes).sum(),
        layers,
    })
}

fn list_text(listing: &Listing) -> String {
    let (folder, bytes, limit) = (&listing.layer_dir, listing.bytes, listing.limit_bytes);
    let mut text = command::heading(folder, listing.enabled, bytes, limit);
    if !listing.layers.is_empty() {
        text.push_str("KEY               DISK  LAST USED  STATE\n");
    }
    for entry in &listing.layers {
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "{:<12} {:>9}  {:<9}  {}",
            entry.key.short(),
            format!("{} KiB", entry.bytes >> 10),
            age(entry.last_used),
            if entry.in_use { "in use" } else { "unused" },
        );
    }
    text
}

fn remove(config: &Config, keys: &[String], unused: bool) -> Result<Removed> {
    let mut removed = Vec::new();
    let Some(store) = Store::existing(&config.layer_dir)? else {
        return match keys.first() {
            Some(key) => Err(command::none("layer", key)),
            None => Ok(Removed { removed }),
        };
    };
    let there = store.list()?;
    let meant: Vec<&Entry> = if unused {
        there.iter().filter(|one| !one.in_use).collect()
    } else {
        // All of them are looked up before one is removed.
        let picked = keys
            .iter()
            .map(|key| command::pick("layer", &there, key, |one| &one.key));
        picked.collect::<Result<_>>()?
    };
    for one in meant {
        match store.remove(&one.key) {
            Ok(true) => removed.push(one.key.clone()),
            Ok(false) => {}
            // It has come into use since.
            Err(LayerError::InUse) if unused => {}
            Err(error) => return Err(error.into()),
        }
    }
    if unused {
        store.sweep()?;
    }
    Ok(Removed { removed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_listed_and_removed_by_the_digits_of_their_keys() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            layer_dir: dir.path().join("layers"),
            ..Config::default()
        };
        assert!(list(&config).unwrap().layers.is_empty());
        assert!(remove(&config, &["abcd".into()], false).is_err());
        assert!(!config.layer_dir.exists());
        Store::open(&config.layer_dir).unwrap();
        for start in ["abcd1", "abcd2", "ef012"] {
            let name = format!("{start:0<64}.erofs");
            std::fs::write(config.layer_dir.join(name), [1; 5000]).unwrap();
        }
        let listing = list(&config).unwrap();
        assert_eq!(listing.layers.len(), 3);
        assert!(
            list_text(&listing).contains("unused"),
            "{}",
            list_text(&listing)
        );
        assert!(list_text(&listing).contains("switched off"));
        let json = serde_json::to_value(&listing).unwrap();
        assert_eq!(json["layers"][0]["in_use"], false);
        assert!(remove(&config, &["abcd".into()], false).is_err());
        let removed = remove(&config, &["abcd2".into()], false).unwrap();
        assert_eq!(removed.removed.len(), 1);
        assert_eq!(remove(&config, &[], true).unwrap().removed.len(), 2);
        assert!(list(&config).unwrap().layers.is_empty());
    }
}
