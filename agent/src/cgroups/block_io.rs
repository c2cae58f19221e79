//! `linux.resources.blockIO`, which speaks of cgroup v1's files, for cgroup v2's io controller.
//!
//! Devices are those of the guest: the host translates its numbers, if it passes a device on.

use super::limits::Setting;
use crate::error::Failure;
use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice};

/// Range of weights of the runtime spec.
const WEIGHTS: std::ops::RangeInclusive<u16> = 10..=1000;

/// Converts all of it.
pub fn settings(io: &LinuxBlockIo) -> Result<Vec<Setting>, Failure> {
    let mut settings = Vec::new();
    let given = |weight: Option<u16>| weight.filter(|weight| *weight != 0);
    if given(io.leaf_weight()).is_some() {
        return Err(no_leaf_weight("linux.resources.blockIO.leafWeight"));
    }
    if let Some(value) = given(io.weight()) {
        let field = "linux.resources.blockIO.weight";
        let value = weight(field, value)?;
        settings.push(setting("io.weight", format!("default {value}"), field));
    }
    for device in io.weight_device().iter().flatten() {
        let field = "linux.resources.blockIO.weightDevice";
        if given(device.leaf_weight()).is_some() {
            return Err(no_leaf_weight(field));
        }
        let device_name = numbers(field, device.major(), device.minor())?;
        if let Some(value) = given(device.weight()) {
            let value = weight(field, value)?;
            settings.push(setting(
                "io.weight",
                format!("{device_name} {value}"),
                field,
            ));
        }
    }
    let throttles = [
        (
            "rbps",
            "linux.resources.blockIO.throttleReadBpsDevice",
            io.throttle_read_bps_device(),
        ),
        (
            "wbps",
            "linux.resources.blockIO.throttleWriteBpsDevice",
            io.throttle_write_bps_device(),
        ),
        (
            "riops",
            "linux.resources.blockIO.throttleReadIOPSDevice",
            io.throttle_read_iops_device(),
        ),
        (
            "wiops",
            "linux.resources.blockIO.throttleWriteIOPSDevice",
            io.throttle_write_iops_device(),
        ),
    ];
    for (key, field, devices) in throttles {
        for device in devices.iter().flatten() {
            settings.push(throttle(key, field, device)?);
        }
    }
    Ok(settings)
}

fn throttle(
    key: &str,
    field: &'static str,
    device: &LinuxThrottleDevice,
) -> Result<Setting, Failure> {
    let name = numbers(field, device.major(), device.minor())?;
    // As in cgroup v1, 0 takes the limit away.
    let rate = match device.rate() {
        0 => "max".to_owned(),
        rate => rate.to_string(),
    };
    Ok(setting("io.max", format!("{name} {key}={rate}"), field))
}

fn setting(file: &'static str, value: String, field: &'static str) -> Setting {
    Setting {
        file: file.into(),
        value,
        field,
    }
}

/// From 10 to 1000 to 1 to 10000, linearly as all runtimes do it.
fn weight(field: &str, weight: u16) -> Result<u64, Failure> {
    if !WEIGHTS.contains(&weight) {
        return Err(Failure::invalid(
            field,
            format!(
                "{weight} is not in {} to {}",
                WEIGHTS.start(),
                WEIGHTS.end()
            ),
        ));
    }
    Ok(1 + (u64::from(weight) - 10) * 9_999 / 990)
}

fn numbers(field: &str, major: i64, minor: i64) -> Result<String, Failure> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) => Ok(format!("{major}:{minor}")),
        _ => Err(Failure::invalid(
            field,
            format!("{major}:{minor} is no device number"),
        )),
    }
}

fn no_leaf_weight(field: &str) -> Failure {
    Failure::invalid(field, "cgroup v2 has no leaf weights; leave it out")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(json: serde_json::Value) -> Result<Vec<(String, String)>, String> {
        let io: LinuxBlockIo = serde_json::from_value(json).expect("block io");
        settings(&io)
            .map(|settings| {
                let pair = |setting: Setting| (setting.file.into_owned(), setting.value);
                settings.into_iter().map(pair).collect()
            })
            .map_err(|failure| failure.message)
    }

    #[test]
    fn converts_weights_and_throttles() {
        let json = serde_json::json!({
            "weight": 10, "leafWeight": 0,
            "weightDevice": [{"major": 254, "minor": 0, "weight": 1000}],
            "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 1048576}],
            "throttleWriteBpsDevice": [{"major": 254, "minor": 16, "rate": 0}],
            "throttleReadIOPSDevice": [{"major": 254, "minor": 0, "rate": 7}],
            "throttleWriteIOPSDevice": [{"major": 254, "minor": 0, "rate": 9}],
        });
        let expected = [
            ("io.weight", "default 1"),
            ("io.weight", "254:0 10000"),
            ("io.max", "254:0 rbps=1048576"),
            ("io.max", "254:16 wbps=max"),
            ("io.max", "254:0 riops=7"),
            ("io.max", "254:0 wiops=9"),
        ];
        let expected = expected.map(|(file, value)| (file.to_owned(), value.to_owned()));
        assert_eq!(convert(json), Ok(expected.to_vec()));
        assert_eq!(convert(serde_json::json!({})), Ok(vec![]));
    }

    #[test]
    fn refuses_by_name_what_it_cannot_honour() {
        for (json, field) in [
            (serde_json::json!({"weight": 9}), "blockIO.weight"),
            (serde_json::json!({"weight": 1001}), "blockIO.weight"),
            (serde_json::json!({"leafWeight": 10}), "leafWeight"),
            (
                serde_json::json!({"throttleReadBpsDevice": [{"major": -1, "minor": 0, "rate": 1}]}),
                "throttleReadBpsDevice",
            ),
        ] {
            let refusal = convert(json.clone()).expect_err("refused");
            assert!(refusal.contains(field), "{json}: {refusal}");
        }
    }
}
