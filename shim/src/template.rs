//! `bulkhead template`: looks at the templates that starts have made, makes one ahead, removes some.
//!
//! With `--json`, `list` prints one object and `show` and `build` print one entry of its
//! `templates`. The keys are stable; later versions may add some:
//!
//! | key | value |
//! |---|---|
//! | `template_dir`, `enabled`, `limit_bytes` | from the configuration |
//! | `bytes` | what all templates together take on the disk |
//! | `templates[].key` | 64 hexadecimal digits |
//! | `templates[].bytes` | what it takes on the disk |
//! | `templates[].uses` | starts that have used it |
//! | `templates[].last_used` | seconds since the epoch; its making if it was never used |
//! | `templates[].current` | whether starts can still use it: nothing that it was made from has changed |
//! | `templates[].description` | what it was made from, when (`created`) and in what time (`build_ms`); null if that is unreadable |

use crate::command::{self, Output, Result, age, find_config, render};
use bulkhead_sandbox::config::{Config, MAX_MEMORY_MIB, MIN_MEMORY_MIB};
use bulkhead_sandbox::pod::PodLimits;
use bulkhead_sandbox::sizing::{self, MachineSize};
use bulkhead_sandbox::template::{self, Entry, FileIdentity, Progress, Store};
use clap::Subcommand;
use serde::Serialize;
use std::fmt::Write as _;
use std::io;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Instant;

const EXAMPLES_LIST: &str = "Examples:\n  bulkhead template list\n  bulkhead template list --json";
const EXAMPLES_BUILD: &str = "Examples:\n  bulkhead template build\n  \
                              bulkhead template build --memory-mib 512 --vcpus 2";
const EXAMPLES_SHOW: &str = "Examples:\n  bulkhead template show 3f2a9c\n  \
                             bulkhead template show 3f2a9c --json";
const EXAMPLES_RM: &str = "Examples:\n  bulkhead template rm 3f2a9c\n  bulkhead template rm --stale\n  \
                           bulkhead template rm --all";

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Lists the templates, the least recently used first.
    #[command(after_help = EXAMPLES_LIST)]
    List(Output),
    /// Makes the template of one kind of machine now, even if there is one.
    ///
    /// Starts make what they need by themselves; this is for the first one not to wait.
    #[command(after_help = EXAMPLES_BUILD)]
    Build {
        /// Guest memory in MiB, as `list` shows it [default: the configuration's].
        #[arg(long, value_name = "MIB",
              value_parser = clap::value_parser!(u32).range(i64::from(MIN_MEMORY_MIB)..=i64::from(MAX_MEMORY_MIB)))]
        memory_mib: Option<u32>,
        /// Number of vCPUs [default: the configuration's].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
        vcpus: Option<u8>,
        /// How to print.
        #[command(flatten)]
        output: Output,
    },
    /// Shows what one template was made from.
    #[command(after_help = EXAMPLES_SHOW)]
    Show {
        /// The first digits of its key, 4 at least.
        key: String,
        /// How to print.
        #[command(flatten)]
        output: Output,
    },
    /// Removes templates; virtual machines that were started from them go on.
    #[command(after_help = EXAMPLES_RM)]
    Rm {
        /// The first digits of their keys, 4 at least.
        #[arg(required_unless_present_any = ["all", "stale"])]
        keys: Vec<String>,
        /// Removes all of them.
        #[arg(long, conflicts_with_all = ["keys", "stale"])]
        all: bool,
        /// Removes those that no start can use any more.
        #[arg(long, conflicts_with = "keys")]
        stale: bool,
        /// How to print.
        #[command(flatten)]
        output: Output,
    },
}

/// An entry of the store, with what only a look at the host can tell.
#[derive(Debug, Clone, Serialize)]
struct Shown {
    #[serde(flatten)]
    entry: Entry,
    current: bool,
}

#[derive(Debug, Serialize)]
struct Listing {
    template_dir: PathBuf,
    enabled: bool,
    limit_bytes: u64,
    bytes: u64,
    templates: Vec<Shown>,
}

#[derive(Debug, Serialize)]
struct Removed {
    removed: Vec<template::Key>,
}

impl From<Entry> for Shown {
    fn from(entry: Entry) -> Self {
        let described = entry.description.as_ref();
        // A description that doesn't lead to the key it lies under was put there by someone else.
        let current = described.is_some_and(|description| {
            description.identity.key() == entry.key && description.identity.is_current()
        });
        Self { entry, current }
    }
}

/// Runs one command.
///
/// # Errors
/// When it can't do what it was asked to.
pub fn run(command: TemplateCommand) -> Result<()> {
    let mut out = io::stdout().lock();
    let text = match command {
        TemplateCommand::List(output) => {
            let listing = list(&find_config(&output)?)?;
            render(&output, &listing, list_text)?
        }
        TemplateCommand::Show { key, output } => {
            let all = entries(&find_config(&output)?)?;
            let shown = pick(&all, &key)?;
            render(&output, shown, show_text)?
        }
        TemplateCommand::Build {
            memory_mib,
            vcpus,
            output,
        } => {
            let config = find_config(&output)?;
            let built = build(&config, memory_mib, vcpus, output.json)?;
            render(&output, &built, |built| {
                format!("{}\n", built.entry.key.short())
            })?
        }
        TemplateCommand::Rm {
            keys,
            all,
            stale,
            output,
        } => {
            let removed = remove(&find_config(&output)?, &keys, all, stale)?;
            render(&output, &removed, |removed| {
                command::removed_text(&removed.removed)
            })?
        }
    };
    out.write_all(text.as_bytes())?;
    Ok(())
}

fn entries(config: &Config) -> Result<Vec<Shown>> {
    match Store::existing(&config.template_dir)? {
        Some(store) => Ok(store.list()?.into_iter().map(Shown::from).collect()),
        None => Ok(Vec::new()),
    }
}

fn list(config: &Config) -> Result<Listing> {
    let templates = entries(config)?;
    Ok(Listing {
        template_dir: config.template_dir.clone(),
        enabled: config.templates,
        limit_bytes: u64::from(config.template_limit_mib) << 20,
        bytes: templates.iter().map(|one| one.entry.bytes).sum(),
        templates,
    })
}

/// The one template that `prefix` names.
fn pick<'a>(all: &'a [Shown], prefix: &str) -> Result<&'a Shown> {
    command::pick("template", all, prefix, |one| &one.entry.key)
}

fn remove(config: &Config, keys: &[String], all: bool, stale: bool) -> Result<Removed> {
    let mut removed = Vec::new();
    let Some(store) = Store::existing(&config.template_dir)? else {
        return match keys.first() {
            Some(key) => Err(command::none("template", key)),
            None => Ok(Removed { removed }),
        };
    };
    let there: Vec<Shown> = store.list()?.into_iter().map(Shown::from).collect();
    let meant: Vec<&Shown> = if all {
        there.iter().collect()
    } else if stale {
        there.iter().filter(|one| !one.current).collect()
    } else {
        // All of them are looked up before one is removed.
        let picked = keys.iter().map(|key| pick(&there, key));
        picked.collect::<Result<_>>()?
    };
    for one in meant {
        if store.remove(&one.entry.key)? {
            removed.push(one.entry.key.clone());
        }
    }
    if all || stale {
        store.sweep()?;
    }
    Ok(Removed { removed })
}

fn build(
    config: &Config,
    memory_mib: Option<u32>,
    vcpus: Option<u8>,
    quiet: bool,
) -> Result<Shown> {
    let mut wanted = config.clone();
    wanted.memory_mib = memory_mib.unwrap_or(config.memory_mib);
    wanted.vcpus = vcpus.unwrap_or(config.vcpus);
    let size = sizing::machine_size(&wanted, PodLimits::default(), sizing::host_memory()?)?;
    let begin = Instant::now();
    let progress = |step| {
        if !quiet {
            let step = match step {
                Progress::Booting => describe_boot(size),
                Progress::Preparing => "preparing what every container needs".into(),
                Progress::Saving => "saving the machine".into(),
            };
            eprintln!("{:6.1} s  {step}", begin.elapsed().as_secs_f64());
        }
    };
    // The VM's death signal is tied to the thread that starts it: this one, with this runtime.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let built = runtime.block_on(template::build(config, size, &progress))?;
    if !quiet {
        eprintln!(
            "{:6.1} s  done: {} MiB in {}",
            begin.elapsed().as_secs_f64(),
            built.bytes.div_ceil(1 << 20),
            config.template_dir.display()
        );
    }
    Ok(Shown::from(built))
}

fn describe_boot(size: MachineSize) -> String {
    let MachineSize {
        vcpus, memory_mib, ..
    } = size;
    format!("booting a machine of {memory_mib} MiB with {vcpus} vCPU")
}

fn list_text(listing: &Listing) -> String {
    let (folder, bytes, limit) = (&listing.template_dir, listing.bytes, listing.limit_bytes);
    let mut text = command::heading(folder, listing.enabled, bytes, limit);
    if !listing.templates.is_empty() {
        text.push_str("KEY           MEMORY  VCPUS    DISK   USES  LAST USED  STATE\n");
    }
    for shown in &listing.templates {
        let entry = &shown.entry;
        let shape = entry.description.as_ref().map(|one| &one.identity.shape);
        let number = |number: Option<u32>| number.map_or("?".into(), |number| number.to_string());
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "{:<12} {:>7} {:>6} {:>7} {:>6}  {:<9}  {}",
            entry.key.short(),
            number(shape.map(|shape| shape.memory_mib)),
            number(shape.map(|shape| u32::from(shape.vcpus))),
            format!("{} MiB", entry.bytes.div_ceil(1 << 20)),
            entry.uses,
            age(entry.last_used),
            state(shown),
        );
    }
    text
}

fn state(shown: &Shown) -> &'static str {
    match (shown.current, &shown.entry.description) {
        (true, _) => "current",
        (false, Some(_)) => "stale",
        (false, None) => "unreadable",
    }
}

fn show_text(shown: &Shown) -> String {
    let entry = &shown.entry;
    let mut lines = vec![
        ("key", entry.key.to_string()),
        ("state", state(shown).to_owned()),
        ("disk", format!("{} KiB", entry.bytes >> 10)),
        ("uses", entry.uses.to_string()),
        ("last used", age(entry.last_used)),
    ];
    if let Some(description) = &entry.description {
        let identity = &description.identity;
        let shape = &identity.shape;
        let changed = |file: &FileIdentity| {
            let mark = if file.is_current() {
                ""
            } else {
                " (changed since)"
            };
            format!("{}{mark}", file.path)
        };
        lines.extend([
            ("created", age(description.created)),
            ("build took", format!("{} ms", description.build_ms)),
            ("version", identity.version.clone()),
            ("memory", format!("{} MiB", shape.memory_mib)),
            ("vCPUs", shape.vcpus.to_string()),
            ("parameters", shape.kernel_params.join(" ")),
            ("kernel", changed(&identity.kernel)),
            ("root image", changed(&identity.rootfs)),
            ("VMM", changed(&identity.vmm)),
            ("host kernel", identity.host.kernel.clone()),
        ]);
    }
    lines
        .into_iter()
        .map(|(name, value)| printable(format!("{name:<12} {value}")) + "\n")
        .collect()
}

/// A description is a file's content: it mustn't move a terminal's cursor.
fn printable(line: String) -> String {
    line.trim_end()
        .chars()
        .map(|c| if c.is_control() { '·' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &std::path::Path) -> Config {
        Config {
            template_dir: dir.join("templates"),
            ..Config::default()
        }
    }

    /// A store with folders of these names, which hold no description.
    fn store(dir: &std::path::Path, keys: &[String]) -> Config {
        let config = config(dir);
        Store::open(&config.template_dir).unwrap();
        for key in keys {
            std::fs::create_dir(config.template_dir.join(key)).unwrap();
        }
        config
    }

    #[test]
    fn without_a_folder_there_is_nothing_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let listing = list(&config).unwrap();
        assert!(listing.templates.is_empty());
        assert!(list_text(&listing).contains("in use, 0 of 2048 MiB"));
        assert!(
            remove(&config, &[], true, false)
                .unwrap()
                .removed
                .is_empty()
        );
        let error = remove(&config, &["abcd".into()], false, false).unwrap_err();
        assert!(error.to_string().contains("abcd"), "{error}");
        assert!(!config.template_dir.exists());
    }

    #[test]
    fn a_key_is_named_by_enough_of_its_digits_to_tell() {
        let dir = tempfile::tempdir().unwrap();
        let keys = ["abcd1", "abcd2", "ef012"].map(|start| format!("{start:0<64}"));
        let config = store(dir.path(), &keys);
        let all = entries(&config).unwrap();
        assert_eq!(pick(&all, "ef01").unwrap().entry.key.as_str(), keys[2]);
        for (prefix, wanted) in [
            ("abcd", "more than one"),
            ("ef0", "4 digits"),
            ("1234", "no "),
        ] {
            let error = pick(&all, prefix).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        // Nothing goes if one of the keys isn't there.
        let wanted = ["abcd1".to_owned(), "9999".to_owned()];
        assert!(remove(&config, &wanted, false, false).is_err());
        assert_eq!(entries(&config).unwrap().len(), 3);
        assert_eq!(
            remove(&config, &wanted[..1], false, false)
                .unwrap()
                .removed
                .len(),
            1
        );
        assert_eq!(remove(&config, &[], false, true).unwrap().removed.len(), 2);
        assert_eq!(std::fs::read_dir(&config.template_dir).unwrap().count(), 0);
    }

    #[test]
    fn a_template_that_cannot_be_read_is_shown_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let key = "ab".repeat(32);
        let config = store(dir.path(), std::slice::from_ref(&key));
        let path = config.template_dir.join(&key).join("template.json");
        std::fs::write(path, "\x1b[2J no JSON").unwrap();
        let listing = list(&config).unwrap();
        assert!(list_text(&listing).contains("unreadable"));
        assert!(show_text(&listing.templates[0]).contains(&key));
        let json = serde_json::to_value(&listing).unwrap();
        assert_eq!(json["templates"][0]["key"], key.as_str());
        assert_eq!(json["templates"][0]["current"], false);
        assert!(json["templates"][0]["description"].is_null());
        assert_eq!(printable("a\x1b[2Jb".into()), "a·[2Jb");
    }
}
