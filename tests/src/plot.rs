//! A picture of the phases of a start: stacked bars as SVG, drawn from the JSON of
//! `scripts/dev bench start --json`.

use crate::error::{Error, Result};
use serde_json::Value;
use std::fmt::Write;

const WIDTH: f64 = 860.0;
/// Where bars begin: labels stand before.
const LEFT: f64 = 150.0;
/// Length of the longest bar; its value stands after.
const LENGTH: f64 = 600.0;
const BAR: f64 = 22.0;
const ROW: f64 = 32.0;
/// Bars this many times shorter than the longest get a panel with a scale of their own.
const ZOOM: f64 = 3.0;

/// Colours that differ in lightness too.
const HOST: Phase = Phase("host side: shim or runc", "#9aa0a6");
const VMM: Phase = Phase("VMM until the guest runs", "#d95f02");
const GUEST: Phase = Phase("guest until its agent is ready", "#1f4e79");
const CONTAINER: Phase = Phase("container set up in the guest", "#5fa2dd");
const PROGRAM: Phase = Phase("program until its first output", "#a6d96a");

/// Name in the legend, and colour.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Phase(&'static str, &'static str);

#[derive(Debug, Clone, PartialEq)]
struct Bar {
    label: &'static str,
    /// Milliseconds of each phase.
    phases: Vec<(Phase, f64)>,
}

impl Bar {
    fn total(&self) -> f64 {
        self.phases.iter().map(|(_, ms)| ms).sum()
    }

    /// The phases between moments, each in milliseconds since the first; one that is unknown
    /// belongs to the phase after it.
    fn from_moments(label: &'static str, moments: &[(Phase, Option<f64>)]) -> Option<Self> {
        let mut phases = Vec::new();
        let mut before = 0.0;
        for (phase, moment) in moments {
            if let Some(moment) = moment {
                phases.push((*phase, (moment - before).max(0.0)));
                before = before.max(*moment);
            }
        }
        (!phases.is_empty()).then_some(Self { label, phases })
    }
}

/// Draws the result of a comparison of starts.
///
/// # Errors
/// When the JSON holds no figure of any start.
pub fn svg(bench: &Value) -> Result<String> {
    let bars = whole_starts(bench);
    let vmm_parts = vmm_parts(bench);
    if bars.is_empty() && vmm_parts.is_empty() {
        return Err(Error::Unexpected(
            "the JSON holds no figures of starts; make it with: scripts/dev bench start --json"
                .into(),
        ));
    }
    let longest = bars.iter().map(Bar::total).fold(0.0, f64::max);
    let mut short: Vec<Bar> = bars
        .iter()
        .filter(|bar| bar.total() * ZOOM < longest)
        .cloned()
        .collect();
    if short.len() < 2 {
        // Nothing to compare.
        short.clear();
    }
    let mut body = String::new();
    let mut y = 30.0;
    text(
        &mut body,
        16.0,
        y,
        "bold 16px",
        "start",
        "Start of a container, by phase (medians)",
    );
    y += 14.0;
    y = legend(&mut body, y);
    y = panel(
        &mut body,
        y,
        "From the command to the container's first output (QEMU: to the agent)",
        &bars,
    );
    y = panel(
        &mut body,
        y,
        "The shorter ones, on a scale of their own",
        &short,
    );
    y = panel(
        &mut body,
        y,
        "VMM alone: process start to the first guest instruction",
        &vmm_parts,
    );
    if let Some(line) = footer(bench) {
        text(&mut body, 16.0, y + 16.0, "11px", "start", &line);
        y += 20.0;
    }
    let height = y + 16.0;
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         width=\"{WIDTH}\" height=\"{height:.0}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    ))
}

fn whole_starts(bench: &Value) -> Vec<Bar> {
    let number = |subject: &str, key: &str| bench[subject][key].as_f64();
    let mut bars = Vec::new();
    for (subject, label) in [
        ("template", "Bulkhead, template"),
        ("cold", "Bulkhead, cold"),
    ] {
        let output = number(subject, "first_output_ms");
        // What comes before the VMM's start; with it, all other moments are later by so much.
        let host = match (number(subject, "command_to_output_ms"), output) {
            (Some(command), Some(output)) => (command - output).max(0.0),
            _ => 0.0,
        };
        let later = |key: &str| number(subject, key).map(|ms| ms + host);
        bars.extend(Bar::from_moments(
            label,
            &[
                (HOST, (host > 0.0).then_some(host)),
                (VMM, later("vmm_to_guest_ms")),
                (GUEST, later("vmm_to_agent_ms")),
                (CONTAINER, later("vmm_to_first_exec_ms")),
                (PROGRAM, later("first_output_ms")),
            ],
        ));
    }
    bars.extend(Bar::from_moments(
        "QEMU microvm",
        &[
            (VMM, number("qemu_microvm", "vmm_to_guest_ms")),
            (GUEST, number("qemu_microvm", "vmm_to_agent_ms")),
        ],
    ));
    bars.extend(Bar::from_moments(
        "runc",
        &[(HOST, number("runc", "first_output_ms"))],
    ));
    bars
}

fn vmm_parts(bench: &Value) -> Vec<Bar> {
    [
        ("template", "Bulkhead, template"),
        ("cold", "Bulkhead, cold"),
        ("qemu_microvm", "QEMU microvm"),
    ]
    .into_iter()
    .filter_map(|(subject, label)| {
        let ms = bench[subject]["vmm_to_guest_ms"].as_f64();
        Bar::from_moments(label, &[(VMM, ms)])
    })
    .collect()
}

fn footer(bench: &Value) -> Option<String> {
    let machine = &bench["machine"];
    Some(format!(
        "{} x {}, Linux {}, KVM {}; medians of {} rounds; {}",
        machine["processors"].as_u64()?,
        machine["processor"].as_str()?,
        machine["host_kernel"].as_str()?,
        bench["kvm_kind"].as_str()?,
        bench["rounds"].as_u64()?,
        bench["repeat"].as_str()?,
    ))
}

/// Draws the colours' names; returns where to go on.
fn legend(body: &mut String, top: f64) -> f64 {
    let (mut x, mut y) = (16.0, top + 8.0);
    for Phase(name, colour) in [HOST, VMM, GUEST, CONTAINER, PROGRAM] {
        let width = 30.0 + 6.4 * name.len() as f64;
        if x + width > WIDTH {
            (x, y) = (16.0, y + 18.0);
        }
        rectangle(body, x, y, 12.0, 12.0, colour, name);
        text(body, x + 17.0, y + 10.0, "12px", "start", name);
        x += width;
    }
    y + 18.0
}

/// Draws a title and one row for each bar; returns where to go on.
fn panel(body: &mut String, top: f64, title: &str, bars: &[Bar]) -> f64 {
    let longest = bars.iter().map(Bar::total).fold(0.0, f64::max);
    if longest <= 0.0 {
        return top;
    }
    let mut y = top + 26.0;
    text(body, 16.0, y, "bold 13px", "start", title);
    y += 10.0;
    for bar in bars {
        text(body, LEFT - 8.0, y + 15.0, "12px", "end", bar.label);
        let mut x = LEFT;
        for (Phase(name, colour), ms) in &bar.phases {
            let width = ms / longest * LENGTH;
            let title = format!("{name}: {}", time(*ms));
            rectangle(body, x, y, width, BAR, colour, &title);
            x += width;
        }
        text(body, x + 6.0, y + 15.0, "12px", "start", &time(bar.total()));
        y += ROW;
    }
    y
}

fn time(ms: f64) -> String {
    match ms {
        ms if ms >= 10_000.0 => format!("{:.1} s", ms / 1000.0),
        ms if ms >= 1000.0 => format!("{:.2} s", ms / 1000.0),
        ms if ms >= 100.0 => format!("{ms:.0} ms"),
        ms => format!("{ms:.1} ms"),
    }
}

fn rectangle(body: &mut String, x: f64, y: f64, width: f64, height: f64, fill: &str, title: &str) {
    // Writing to a String can't fail.
    let _ = writeln!(
        body,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height}\" \
         fill=\"{fill}\"><title>{}</title></rect>",
        escape(title)
    );
}

fn text(body: &mut String, x: f64, y: f64, font: &str, anchor: &str, content: &str) {
    let _ = writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#202124\" \
         style=\"font:{font} sans-serif\">{}</text>",
        escape(content)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn phases_lie_between_moments() {
        let bench = json!({ "cold": {
            "vmm_to_guest_ms": 10.0, "vmm_to_agent_ms": 1000.0, "vmm_to_first_exec_ms": null,
            "first_output_ms": 1500.0, "command_to_output_ms": 1520.0 } });
        let bars = whole_starts(&bench);
        assert_eq!(
            bars,
            [Bar {
                label: "Bulkhead, cold",
                phases: vec![(HOST, 20.0), (VMM, 10.0), (GUEST, 990.0), (PROGRAM, 500.0)],
            }]
        );
        assert_eq!(bars[0].total(), 1520.0);
    }

    #[test]
    fn short_bars_get_a_scale_of_their_own() {
        let of = |ms: f64| json!({ "first_output_ms": ms, "command_to_output_ms": ms });
        let bench = json!({ "cold": of(9000.0), "template": of(300.0), "runc": of(50.0) });
        let drawn = svg(&bench).unwrap();
        assert!(drawn.contains("on a scale of their own"));
        assert!(
            drawn.contains(">9.00 s<") && drawn.contains(">300 ms<"),
            "{drawn}"
        );
        let drawn = svg(&json!({ "cold": of(900.0), "template": of(300.0) })).unwrap();
        assert!(!drawn.contains("on a scale of their own"));
    }

    #[test]
    fn text_from_the_json_is_escaped() {
        let bench = json!({ "runc": { "first_output_ms": 30.0 }, "kvm_kind": "<script>",
            "rounds": 1, "repeat": "x", "machine": {
                "processors": 2, "processor": "a & b", "host_kernel": "6" } });
        let drawn = svg(&bench).unwrap();
        assert!(drawn.contains("&lt;script&gt;") && drawn.contains("a &amp; b"));
        assert!(!drawn.contains("<script>"));
    }

    #[test]
    fn json_without_figures_is_an_error() {
        for bench in [json!({}), json!([]), json!({ "cold": null })] {
            assert!(svg(&bench).is_err(), "{bench}");
        }
    }
}
