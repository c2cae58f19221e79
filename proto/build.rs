//! Generates the ttrpc client and server of the agent's protocol, with the pure Rust parser (no protoc).

use std::path::Path;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=agent.proto");
    if std::env::var_os("CARGO_FEATURE_AGENT").is_none() {
        return;
    }
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    Codegen::new()
        .out_dir(&out)
        .inputs(["agent.proto"])
        .include(".")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("agent.proto compiles");
    for file in ["agent.rs", "agent_ttrpc.rs"] {
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
