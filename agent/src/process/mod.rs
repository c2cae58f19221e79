//! Processes of containers: what they are to be, how they are made, and how they report back.
//!
//! ```text
//! agent                                     set-up process (child.rs)
//!   spawn: clone3 ───────────────────────────► namespaces, mounts, pivot_root, user, look-up
//!   Control::next ◄──── ready, pty master ─── (init only, or with a terminal)
//!                 ◄──── failed, why ───────── exit
//!   Control::start ───── start ─────────────► (init only) execve
//!   Control::next ◄──── end of file ───────── the program runs: the socket is close-on-exec
//!                 ◄──── failed, why ───────── exit
//! ```

mod ahead;
mod child;
mod clone;
mod control;
mod executable;
mod hooks;
mod identity;
mod plan;
mod pod;
mod report;
mod scheduling;
mod spawn;
mod stdio;
mod sysctls;
mod terminal;

pub use child::Shared;
pub use control::{Control, Progress};
pub use hooks::HookPlan;
pub use plan::ProcessPlan;
pub use scheduling::Personality;
pub use spawn::{Joined, Spawned, Spawner};
pub use stdio::Copiers;
pub use terminal::WindowSize;
