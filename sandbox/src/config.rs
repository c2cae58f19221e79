//! The configuration: one TOML file, every key documented on [`Config`], unknown keys refused.

use crate::network::NetworkConfig;
use serde::Deserialize;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Read when neither the runtime options nor [`CONFIG_ENV`] name a file; may be missing.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";

/// Environment variable that names the file.
pub const CONFIG_ENV: &str = "BULKHEAD_CONFIG";

/// Smallest guest memory in MiB.
pub const MIN_MEMORY_MIB: u32 = 32;

/// Largest guest memory in MiB (1 TiB); what the host has is checked when a VM is sized.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;

/// Smallest and largest limit of the template folder in MiB.
pub const TEMPLATE_LIMIT_MIB: std::ops::RangeInclusive<u32> = 64..=1024 * 1024;

/// Smallest and largest limit of the folder of layers in MiB (16 TiB).
pub const LAYER_LIMIT_MIB: std::ops::RangeInclusive<u32> = 64..=16 * 1024 * 1024;

/// Smallest and largest writable layer in MiB: what ext4 can be made in, and holds.
pub const WRITABLE_LAYER_MIB: std::ops::RangeInclusive<u32> = 16..=16 * 1024 * 1024;

/// Largest number of vCPUs.
pub const MAX_VCPUS: u8 = bulkhead_proto::vmm::MAX_VCPUS;

/// The kernel's limit for a command line on x86 (COMMAND_LINE_SIZE) less what the VMM adds itself.
const MAX_KERNEL_PARAMS: usize = 1536;

/// What an administrator can set.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Guest kernel: an uncompressed ELF vmlinux. Absolute path.
    pub kernel: PathBuf,
    /// Guest root image: EROFS, with the agent in it. Absolute path.
    pub rootfs: PathBuf,
    /// The bulkhead-vmm program. Absolute path.
    pub vmm: PathBuf,
    /// Folder for the sandboxes' sockets, state and logs; best on a tmpfs. Absolute path.
    pub runtime_dir: PathBuf,
    /// vCPUs of a VM whose pod has no CPU limit, 1 to 32; with a limit, at least this many.
    pub vcpus: u8,
    /// Guest memory in MiB of a VM whose pod has no memory limit, 32 to 1048576; with a limit, at
    /// least this much.
    pub memory_mib: u32,
    /// Memory in MiB up to which a running VM grows when its containers' limits are raised, 0 to
    /// 1048576, though never beyond the host's. VMs that start with as much don't grow.
    pub memory_max_mib: u32,
    /// Appended to the guest kernel's command line, one parameter each.
    pub kernel_params: Vec<String>,
    /// How much of the guest's console is kept in console.log.
    pub console: Console,
    /// Whether VMs are started from templates, which the first start of each kind makes.
    pub templates: bool,
    /// Folder for the templates, root's alone. Absolute path.
    pub template_dir: PathBuf,
    /// What all templates together may take on the disk in MiB, 64 to 1048576. Beyond that the
    /// least recently used ones go, though never the one that was just made.
    pub template_limit_mib: u32,
    /// Whether the layers of images that come as folders (containerd's overlayfs) are converted to
    /// EROFS images, which virtual machines then have as disks.
    pub convert_layers: bool,
    /// Folder for the converted layers, root's alone. Absolute path.
    pub layer_dir: PathBuf,
    /// What all converted layers together may take on the disk in MiB, 64 to 16777216. Beyond that
    /// the least recently used ones go that no container has.
    pub layer_limit_mib: u32,
    /// How much a container can write to its root in MiB, 16 to 16777216; 0 is no limit.
    pub writable_layer_mib: u32,
    /// How fast a pod's network interfaces may be, and what may pass them.
    pub network: NetworkConfig,
}

/// How much the guest prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// Only warnings and panics.
    Off,
    /// All kernel messages from the first instruction on; boots slower.
    Verbose,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/lib/bulkhead/vmlinux".into(),
            rootfs: "/usr/lib/bulkhead/rootfs.erofs".into(),
            vmm: "/usr/libexec/bulkhead/bulkhead-vmm".into(),
            runtime_dir: "/run/bulkhead".into(),
            vcpus: 1,
            memory_mib: 128,
            memory_max_mib: 4096,
            kernel_params: Vec::new(),
            console: Console::Off,
            templates: true,
            template_dir: "/var/lib/bulkhead/templates".into(),
            template_limit_mib: 2048,
            convert_layers: false,
            layer_dir: "/var/lib/bulkhead/layers".into(),
            layer_limit_mib: 16384,
            writable_layer_mib: 0,
            network: NetworkConfig::default(),
        }
    }
}

/// A configuration that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read the configuration {origin}: {cause}")]
    Read {
        /// The file.
        origin: String,
        /// Why.
        cause: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("in the configuration {origin}: {detail}")]
    Parse {
        /// The file, or where else the text came from.
        origin: String,
        /// The parser's message with line, key and what was expected.
        detail: String,
    },
    /// A value out of its range.
    #[error("in the configuration {origin}: {key} = {value}: {allowed}")]
    Range {
        /// The file, or where else the text came from.
        origin: String,
        /// The key.
        key: &'static str,
        /// The value found.
        value: String,
        /// What is allowed.
        allowed: String,
    },
}

/// Where a configuration may come from, as the runtime options of one container say it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigSource {
    /// Path of a file; wins over everything else.
    pub path: Option<PathBuf>,
    /// The text itself; second.
    pub body: Option<String>,
}

impl Config {
    /// Finds and reads the configuration: the runtime options' path, their text, the file named
    /// by [`CONFIG_ENV`], [`DEFAULT_PATH`] if it exists, the built-in defaults.
    ///
    /// # Errors
    /// When a named file can't be read, or the text isn't a valid configuration.
    pub fn find(source: &ConfigSource) -> Result<Self, ConfigError> {
        if let Some(path) = &source.path {
            return Self::read(path);
        }
        if let Some(body) = &source.body {
            return Self::parse(body, "in the runtime options");
        }
        if let Some(path) = std::env::var_os(CONFIG_ENV).filter(|path| !path.is_empty()) {
            return Self::read(Path::new(&path));
        }
        match Self::read(Path::new(DEFAULT_PATH)) {
            Err(ConfigError::Read { cause, .. }) if cause.kind() == ErrorKind::NotFound => {
                Ok(Self::default())
            }
            other => other,
        }
    }

    /// Reads one file.
    ///
    /// # Errors
    /// When it can't be read or isn't a valid configuration.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let origin = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, &origin),
            Err(cause) => Err(ConfigError::Read { origin, cause }),
        }
    }

    /// Parses and checks a configuration; `origin` names it in errors.
    ///
    /// # Errors
    /// When the text isn't a valid configuration.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|error| ConfigError::Parse {
            origin: origin.to_owned(),
            detail: error.to_string().trim_end().to_owned(),
        })?;
        config.check(origin)?;
        Ok(config)
    }

    fn check(&self, origin: &str) -> Result<(), ConfigError> {
        let range = |key, value: String, allowed: String| {
            Err(ConfigError::Range {
                origin: origin.to_owned(),
                key,
                value,
                allowed,
            })
        };
        for (key, path) in [
            ("kernel", &self.kernel),
            ("rootfs", &self.rootfs),
            ("vmm", &self.vmm),
            ("runtime_dir", &self.runtime_dir),
            ("template_dir", &self.template_dir),
            ("layer_dir", &self.layer_dir),
        ] {
            if !path.is_absolute() {
                return range(key, format!("{path:?}"), "must be an absolute path".into());
            }
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return range(
                "vcpus",
                self.vcpus.to_string(),
                format!("must be 1 to {MAX_VCPUS}"),
            );
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            let allowed = format!("must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} (MiB)");
            return range("memory_mib", self.memory_mib.to_string(), allowed);
        }
        if self.memory_max_mib > MAX_MEMORY_MIB {
            let allowed = format!("must be 0 to {MAX_MEMORY_MIB} (MiB)");
            return range("memory_max_mib", self.memory_max_mib.to_string(), allowed);
        }
        for (key, value, allowed, or_none) in [
            (
                "template_limit_mib",
                self.template_limit_mib,
                TEMPLATE_LIMIT_MIB,
                "",
            ),
            ("layer_limit_mib", self.layer_limit_mib, LAYER_LIMIT_MIB, ""),
            (
                "writable_layer_mib",
                self.writable_layer_mib,
                WRITABLE_LAYER_MIB,
                "0, or ",
            ),
        ] {
            if !allowed.contains(&value) && (value != 0 || or_none.is_empty()) {
                let (low, high) = (allowed.start(), allowed.end());
                let allowed = format!("must be {or_none}{low} to {high} (MiB)");
                return range(key, value.to_string(), allowed);
            }
        }
        for param in &self.kernel_params {
            let printable = param.bytes().all(|byte| (0x21..0x7f).contains(&byte));
            if param.is_empty() || !printable {
                let allowed = "each must be printable ASCII without blanks".into();
                return range("kernel_params", format!("{param:?}"), allowed);
            }
        }
        let length: usize = self.kernel_params.iter().map(|param| param.len() + 1).sum();
        if length > MAX_KERNEL_PARAMS {
            let allowed = format!("must be at most {MAX_KERNEL_PARAMS} characters together");
            return range("kernel_params", format!("{length} characters"), allowed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(Config::parse("", "x").unwrap(), Config::default());
    }

    #[test]
    fn the_documented_example_has_every_key_at_its_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shim/config/bulkhead.toml");
        assert_eq!(Config::read(&path).unwrap(), Config::default());
        let text = std::fs::read_to_string(path).unwrap();
        let table: toml::Table = text.parse().unwrap();
        let mut keys: Vec<_> = table.keys().map(String::as_str).collect();
        keys.sort_unstable();
        let wanted = "console convert_layers kernel kernel_params layer_dir layer_limit_mib \
                      memory_max_mib memory_mib network rootfs runtime_dir template_dir \
                      template_limit_mib templates vcpus vmm writable_layer_mib";
        assert_eq!(keys.join(" "), wanted);
    }

    #[test]
    fn errors_name_file_key_value_and_range() {
        for (text, wanted) in [
            ("vcpus = 0", "/etc/x.toml: vcpus = 0: must be 1 to 32"),
            ("vcpus = 33", "vcpus = 33: must be 1 to 32"),
            ("memory_mib = 31", "memory_mib = 31: must be 32 to 1048576"),
            (
                "memory_max_mib = 1048577",
                "memory_max_mib = 1048577: must be 0 to 1048576 (MiB)",
            ),
            (
                "kernel = \"vmlinux\"",
                "kernel = \"vmlinux\": must be an absolute path",
            ),
            (
                "kernel_params = [\"a b\"]",
                "kernel_params = \"a b\": each must be printable",
            ),
            ("memroy_mib = 64", "unknown field `memroy_mib`"),
            ("console = \"loud\"", "unknown variant `loud`"),
            ("vcpus = \"two\"", "invalid type"),
            ("templates = \"yes\"", "invalid type"),
            (
                "template_dir = \"templates\"",
                "template_dir = \"templates\": must be an absolute path",
            ),
            (
                "template_limit_mib = 63",
                "template_limit_mib = 63: must be 64 to 1048576 (MiB)",
            ),
            ("template_limit_mib = 1048577", "must be 64 to 1048576"),
            (
                "layer_dir = \"layers\"",
                "layer_dir = \"layers\": must be an absolute path",
            ),
            (
                "layer_limit_mib = 0",
                "layer_limit_mib = 0: must be 64 to 16777216 (MiB)",
            ),
            (
                "writable_layer_mib = 15",
                "writable_layer_mib = 15: must be 0, or 16 to",
            ),
            ("vcpus = ", "/etc/x.toml"),
        ] {
            let error = Config::parse(text, "/etc/x.toml").unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
            assert!(error.contains("/etc/x.toml"), "{error}");
        }
    }

    #[test]
    fn a_named_file_must_exist_and_wins() {
        let source = ConfigSource {
            path: Some("/nonexistent/b.toml".into()),
            body: Some("vcpus = 2".into()),
        };
        let error = Config::find(&source).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/b.toml"), "{error}");
        let source = ConfigSource {
            path: None,
            body: Some("vcpus = 2".into()),
        };
        assert_eq!(Config::find(&source).unwrap().vcpus, 2);
    }

    proptest! {
        #[test]
        fn accepted_numbers_are_in_range(vcpus in any::<i64>(), memory in any::<i64>()) {
            let text = format!("vcpus = {vcpus}\nmemory_mib = {memory}");
            let ok = (1..=32).contains(&vcpus) && (32..=1_048_576).contains(&memory);
            prop_assert_eq!(Config::parse(&text, "x").is_ok(), ok);
        }
    }
}
