//! Generates the ttrpc client and server of the agent's protocol, and the messages of CRI's that are
//! read, with the pure Rust parser (no protoc).

use std::path::Path;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    generate("AGENT", "agent", &["agent.rs", "agent_ttrpc.rs"]);
    generate("CRI", "cri", &["cri.rs"]);
}

/// Generates `files` of `NAME.proto` if the feature is on.
fn generate(feature: &str, name: &str, files: &[&str]) {
    let source = format!("{name}.proto");
    println!("cargo:rerun-if-changed={source}");
    if std::env::var_os(format!("CARGO_FEATURE_{feature}")).is_none() {
        return;
    }
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    Codegen::new()
        .out_dir(&out)
        .inputs([&source])
        .include(".")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .unwrap_or_else(|error| panic!("{source} does not compile: {error}"));
    for file in files {
        strip_inner_attributes(&Path::new(&out).join(file));
    }
}

/// `include!` takes no inner attributes or inner doc comments; the including module carries the
/// ones that matter.
fn strip_inner_attributes(path: &Path) {
    let text = std::fs::read_to_string(path).expect("generated file is readable");
    let kept: String = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .flat_map(|line| [line, "\n"])
        .collect();
    std::fs::write(path, kept).expect("generated file is writable");
}
