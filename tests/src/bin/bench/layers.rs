//! An image's layers as folders that the guest reads by virtio-fs, and converted to disks: what a
//! conversion takes, and what a container's start and its reading cost with either.

use crate::guests::vcpu_threads;
use crate::host::{self, Machine};
use crate::pod;
use crate::start::marks::Marks;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::perf::Watch;
use bulkhead_tests::pod::{member_spec, sandbox_spec};
use bulkhead_tests::shim::{Bundle, RootMount, Shim, TaskVersion, process};
use bulkhead_tests::stats::{Quartiles, rounded};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const VERSION: TaskVersion = TaskVersion::V3;
const NO_STREAMS: [&str; 3] = [""; 3];
/// The pods: without conversion, and with it.
const PODS: [&str; 2] = ["bench-share", "bench-converted"];
const SIGKILL: u32 = 9;

/// Small files of the layer, and the size of each.
const FILES: usize = 64;
const FILE: usize = 16 << 10;

/// Longest that a program may take to begin in the guest.
const BEGIN: Duration = Duration::from_secs(60);

const NOTES: [&str; 3] = [
    "An image of two layers: busybox, and a large file with 64 files of 16 KiB. `share`: the host \
     mounts the overlay, and the guest reads it by virtio-fs. `converted`: each layer is an EROFS image \
     on a disk, and the guest puts them together. Each in a pod of its own, in turns; each round is one \
     more container there, whose pages the guest hasn't read yet. The host's page cache has them.",
    "create_converting_ms: Create with an empty store of layers, so that both are read whole, for their \
     digests, and converted; convert_ms is what that takes longer than Create. first_create_ms: of the \
     pod's first container, which uses what the template has made ahead where it can.",
    "read: `dd` of the large file, 1 MiB at a time; files: `cat` of the small ones. Instructions: \
     guest kernel instructions that KVM emulates, counted in containers of their own, which are not \
     timed; none where KVM runs guest kernel mode natively.",
];

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench layers\n  \
    scripts/dev bench layers --runs 5 --mib 64 --json")]
pub struct Arguments {
    /// Print JSON: medians and quartiles under `share` and `converted`, and what was compared.
    #[arg(long)]
    json: bool,
    /// How many containers of each kind are timed; as many are counted besides.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Size of the large file, in MiB.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    mib: u32,
}

/// Values of one subject, by the keys of the output.
type Values = BTreeMap<&'static str, Vec<f64>>;

fn add(values: &mut Values, key: &'static str, value: f64) {
    values.entry(key).or_default().push(value);
}

fn median(values: &Values, key: &str) -> Option<f64> {
    Some(Quartiles::of(values.get(key)?)?.median)
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When it can't begin, or a container fails.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let kvm = host::kvm_kind(artifacts)?;
    let machine = Machine::look(artifacts)?;
    let folder = tempfile::tempdir().context(|| "make a folder for the layers".into())?;
    let layers = make_layers(artifacts, folder.path(), arguments.mib)?;
    let store = folder.path().join("store");
    // After the layers: what was changed in the last two seconds is not converted yet.
    pod::warm_up(artifacts)?;
    let plain = pod::settings(false)?;
    let converting = format!("{plain}convert_layers = true\nlayer_dir = {store:?}\n");
    let bundles = [
        sandbox(artifacts, PODS[0], &plain)?,
        sandbox(artifacts, PODS[1], &converting)?,
    ];
    let mut pods = Vec::new();
    for (bundle, settings) in bundles.iter().zip([&plain, &converting]) {
        pods.push(Pod::start(artifacts, bundle, settings, &layers)?);
    }
    let mut values = [Values::new(), Values::new()];
    for (pod, values) in pods.iter().zip(&mut values) {
        let first = pod.member("first")?;
        add(values, "first_create_ms", first.create()?);
        first.end()?;
    }
    for round in 1..=arguments.runs {
        eprintln!("round {round} of {}", arguments.runs);
        std::fs::remove_dir_all(&store).context(|| format!("empty {}", store.display()))?;
        let converting = pods[1].member("converting")?;
        add(&mut values[1], "create_converting_ms", converting.create()?);
        converting.end()?;
        for (pod, values) in pods.iter().zip(&mut values) {
            pod.time(arguments.mib, values)?;
            if kvm == KvmKind::Emulated {
                pod.count(arguments.mib, values)?;
            }
        }
    }
    for pod in pods {
        pod.end()?;
    }
    let [share, mut converted] = values;
    let all = |key: &str| median(&converted, key);
    if let (Some(with), Some(without)) = (all("create_converting_ms"), all("create_ms")) {
        add(&mut converted, "convert_ms", with - without);
    }
    print(&share, &converted, &machine, arguments)
}

/// Busybox, and over it the layer with the data; the uppermost first.
fn make_layers(artifacts: &Artifacts, folder: &Path, mib: u32) -> Result<[PathBuf; 2]> {
    let base = folder.join("base");
    let bundle = Bundle::new(artifacts, "bench-base", "")?;
    let moved = std::process::Command::new("cp")
        .arg("-a")
        .args([bundle.path().join("rootfs"), base.clone()])
        .status();
    if !moved.context(|| "run cp".into())?.success() {
        return Err(Error::Unexpected(
            "the busybox layer can't be copied".into(),
        ));
    }
    let data = folder.join("data");
    let made = || -> std::io::Result<()> {
        std::fs::create_dir_all(data.join("data/small"))?;
        std::fs::write(data.join("data/large"), noise((mib as usize) << 20))?;
        for number in 0..FILES {
            let path = data.join(format!("data/small/{number}"));
            std::fs::write(path, noise(FILE))?;
        }
        Ok(())
    };
    made().context(|| format!("fill {}", data.display()))?;
    Ok([data, base])
}

/// Bytes without a pattern, always the same.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length.div_ceil(8)).flat_map(|_| next()).collect()
}

fn sandbox(artifacts: &Artifacts, id: &str, settings: &str) -> Result<Bundle> {
    let bundle = Bundle::new(artifacts, id, settings)?;
    bundle.set_spec(&sandbox_spec(id))?;
    Ok(bundle)
}

/// A pod whose containers have the image.
struct Pod<'a> {
    artifacts: &'a Artifacts,
    id: &'a str,
    settings: &'a str,
    layers: &'a [PathBuf],
    shim: Shim<'a>,
    vmm: u32,
    marks: Marks,
}

impl<'a> Pod<'a> {
    fn start(
        artifacts: &'a Artifacts,
        bundle: &'a Bundle,
        settings: &'a str,
        layers: &'a [PathBuf],
    ) -> Result<Self> {
        let shim = bundle.start()?;
        let vmm = shim.create(VERSION, NO_STREAMS)?.pid;
        shim.start_process(VERSION, "")?;
        Ok(Self {
            artifacts,
            id: bundle.id(),
            settings,
            layers,
            shim,
            vmm,
            marks: Marks::find(artifacts),
        })
    }

    fn member(&self, id: &str) -> Result<Member> {
        let bundle = Bundle::new(self.artifacts, id, self.settings)?;
        bundle.set_spec(&member_spec(self.id, self.vmm, &["sleep", "1000000"]))?;
        let (upper, work) = (bundle.beside("upper"), bundle.beside("work"));
        for folder in [&upper, &work] {
            std::fs::create_dir(folder).context(|| format!("make {}", folder.display()))?;
        }
        let layers = self.layers.iter().map(|layer| layer.display().to_string());
        let layers: Vec<String> = layers.collect();
        let root = RootMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}", layers.join(":")),
            ],
        };
        let address = self.shim.address.clone();
        Ok(Member {
            bundle,
            root,
            address,
        })
    }

    /// One container on the clock.
    fn time(&self, mib: u32, values: &mut Values) -> Result<()> {
        let member = self.member("timed")?;
        add(values, "create_ms", member.create()?);
        let shim = member.shim()?;
        let start = timed(|| shim.start_process(VERSION, "").map(drop))?;
        add(values, "start_ms", start);
        let read = timed(|| member.read(&shim))?;
        add(values, "read_ms_per_mib", read / f64::from(mib));
        let files = timed(|| member.read_files(&shim))?;
        add(values, "files_ms_per_file", files / FILES as f64);
        member.end()
    }

    /// One container in guest kernel instructions.
    fn count(&self, mib: u32, values: &mut Values) -> Result<()> {
        let thread = vcpu_threads(self.vmm)?;
        let thread = thread.first().copied().unwrap_or(self.vmm);
        let watch = Watch::start(thread, &self.marks.addresses())?;
        let count = || -> Result<f64> {
            let none = || Error::Unexpected("this host counts no guest instructions".into());
            Ok(watch.instructions()?.ok_or_else(none)? as f64)
        };
        let member = self.member("counted")?;
        let before = count()?;
        member.create()?;
        let shim = member.shim()?;
        shim.start_process(VERSION, "")?;
        let begun = watch.wait_for("a program's first instruction", BEGIN, |seen| {
            self.marks.is_exec(seen)
        })?;
        let begun = begun.instructions.unwrap_or_default() as f64;
        add(values, "create_to_exec_instructions", begun - before);
        let before = count()?;
        member.read(&shim)?;
        let read = count()?;
        member.read_files(&shim)?;
        let files = count()?;
        add(
            values,
            "read_instructions_per_mib",
            (read - before) / f64::from(mib),
        );
        add(
            values,
            "files_instructions_per_file",
            (files - read) / FILES as f64,
        );
        member.end()
    }

    fn end(self) -> Result<()> {
        end(&self.shim)?;
        self.shim.shutdown(VERSION)
    }
}

/// A container of the pod.
struct Member {
    bundle: Bundle,
    root: RootMount,
    address: String,
}

impl Member {
    fn shim(&self) -> Result<Shim<'_>> {
        self.bundle.connect(&self.address)
    }

    /// Milliseconds of Create.
    fn create(&self) -> Result<f64> {
        let (shim, root) = (self.shim()?, std::slice::from_ref(&self.root));
        timed(|| shim.create_rooted(VERSION, NO_STREAMS, root).map(drop))
    }

    fn read(&self, shim: &Shim<'_>) -> Result<()> {
        let dd = ["dd", "if=/data/large", "of=/dev/null", "bs=1M"];
        exec(shim, "read", &dd)
    }

    fn read_files(&self, shim: &Shim<'_>) -> Result<()> {
        exec(
            shim,
            "files",
            &["sh", "-c", "exec cat /data/small/* >/dev/null"],
        )
    }

    fn end(self) -> Result<()> {
        end(&self.shim()?)
    }
}

fn exec(shim: &Shim<'_>, id: &str, argv: &[&str]) -> Result<()> {
    shim.exec(VERSION, id, &process(argv), NO_STREAMS)?;
    shim.start_process(VERSION, id)?;
    let status = shim.wait(VERSION, id)?.exit_status;
    shim.delete(VERSION, id)?;
    match status {
        0 => Ok(()),
        other => Err(Error::Unexpected(format!(
            "{argv:?} ended with status {other}"
        ))),
    }
}

/// Ends a container, whether it has begun or not.
fn end(shim: &Shim<'_>) -> Result<()> {
    shim.kill(VERSION, "", SIGKILL, true)?;
    shim.wait(VERSION, "")?;
    shim.delete(VERSION, "").map(drop)
}

fn timed(step: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    step()?;
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// The keys of the output, in their order, with the digits that are shown.
const KEYS: [(&str, u32); 10] = [
    ("first_create_ms", 0),
    ("create_converting_ms", 0),
    ("convert_ms", 0),
    ("create_ms", 0),
    ("start_ms", 0),
    ("create_to_exec_instructions", 0),
    ("read_ms_per_mib", 1),
    ("read_instructions_per_mib", 0),
    ("files_ms_per_file", 1),
    ("files_instructions_per_file", 0),
];

fn print(
    share: &Values,
    converted: &Values,
    machine: &Machine,
    arguments: &Arguments,
) -> Result<()> {
    let (runs, mib) = (arguments.runs, arguments.mib);
    let repeat = format!("scripts/dev bench layers --runs {runs} --mib {mib}");
    let found = |values: &Values, key: &str, digits| {
        values
            .get(key)
            .and_then(|all| Some(Quartiles::of(all)?.rounded(digits)))
    };
    let ratio = |key: &str| Some(rounded(median(converted, key)? / median(share, key)?, 2));
    if arguments.json {
        let subject = |values: &Values| -> Map<String, Value> {
            let all = KEYS.iter();
            all.map(|(key, digits)| ((*key).into(), json!(found(values, key, *digits))))
                .collect()
        };
        let ratios: Map<String, Value> = KEYS
            .iter()
            .map(|(key, _)| ((*key).into(), json!(ratio(key))))
            .collect();
        let whole = json!({
            "share": subject(share),
            "converted": subject(converted),
            "converted_by_share": ratios,
            "machine": machine,
            "compared": NOTES,
            "repeat": format!("{repeat} --json"),
        });
        println!("{whole:#}");
        return Ok(());
    }
    println!("{}\n", machine.line());
    println!(
        "{:<32} {:>12} {:>12} {:>8}",
        "median", "share", "converted", "ratio"
    );
    let text = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    for (key, digits) in KEYS {
        let medians =
            [share, converted].map(|values| found(values, key, digits).map(|all| all.median));
        let [share, converted] = medians.map(text);
        println!(
            "{key:<32} {share:>12} {converted:>12} {:>8}",
            text(ratio(key))
        );
    }
    println!("\nwhat was compared");
    NOTES.iter().for_each(|note| println!("  {note}"));
    println!("repeat with: {repeat}");
    Ok(())
}
