//! The shim's program: `start`, `delete`, `-v`, `-info`, and `serve`, which is `start`'s own.

use bulkhead_shim::flags::Flags;
use bulkhead_shim::{daemon, delete, info, start};
use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The daemon shows this to its user.
            eprintln!("containerd-shim-bulkhead-v2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error + Send + Sync>> {
    let flags = Flags::parse(std::env::args().skip(1))?;
    if flags.version {
        print!("{}", info::version_text());
        return Ok(());
    }
    if flags.info {
        return Ok(start::print(&info::runtime_info())?);
    }
    match flags.action.as_str() {
        "start" => Ok(start::print(&start::run(&flags)?)?),
        "delete" => Ok(start::print(&delete::run(&flags)?)?),
        "serve" => daemon::run(&flags),
        "" => Err("needs an action: start or delete".into()),
        other => Err(format!("unknown action {other:?}: start and delete are known").into()),
    }
}
