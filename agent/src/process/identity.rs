//! User, groups, limits, capabilities and working directory of a process.

use super::plan::ProcessPlan;
use crate::error::{Context, Failure, Kind};
use crate::init::lower_descriptor_limit;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Resource;
use rustix::thread::{Gid, Uid};
use std::ffi::CString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::DirBuilderExt;

/// Longest /etc/passwd that is read.
const MAX_PASSWD: u64 = 1024 * 1024;

/// Sets the resource limits.
pub fn limit(plan: &ProcessPlan) -> Result<(), Failure> {
    for (resource, limit) in &plan.rlimits {
        rustix::process::setrlimit(*resource, *limit)
            .context(|| format!("process.rlimits: set {resource:?}"))?;
    }
    Ok(())
}

/// Takes on the identity: afterwards the process may do no more than its program will. The
/// working directory must have been entered before.
pub fn assume(plan: &ProcessPlan) -> Result<(), Failure> {
    limit(plan)?;
    if !plan
        .rlimits
        .iter()
        .any(|(kind, _)| *kind == Resource::Nofile)
    {
        lower_descriptor_limit().context(|| "set the limit of descriptors")?;
    }
    plan.capabilities.limit_bounding()?;
    if plan.uid != 0 {
        // Otherwise the change of user drops the capabilities that are to be kept.
        rustix::thread::set_keep_capabilities(true).context(|| "keep capabilities")?;
    }
    let groups: Vec<Gid> = plan.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    rustix::thread::set_thread_groups(&groups)
        .context(|| "process.user.additionalGids: set the groups")?;
    let gid = Gid::from_raw(plan.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .context(|| format!("process.user.gid: become group {}", plan.gid))?;
    let uid = Uid::from_raw(plan.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .context(|| format!("process.user.uid: become user {}", plan.uid))?;
    rustix::process::umask(Mode::from_raw_mode(plan.umask));
    if plan.no_new_privileges {
        rustix::thread::set_no_new_privs(true).context(|| "process.noNewPrivileges")?;
    }
    plan.capabilities.apply()
}

/// Enters the working directory; `create` makes it first if it is missing, as runc does for a
/// container's first process.
pub fn enter_cwd(plan: &ProcessPlan, create: bool) -> Result<(), Failure> {
    let cwd = &plan.cwd;
    let refused = |error: Errno| {
        let message = format!(
            "process.cwd: chdir to cwd ({:?}) set in config.json failed: {error}",
            cwd.display().to_string()
        );
        Failure::new(Kind::InvalidArgument, message)
    };
    match rustix::process::chdir(cwd) {
        Err(Errno::NOENT) if create => {
            // The mask is still empty here.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(cwd)
                .map_err(|error| {
                    Failure::invalid("process.cwd", format!("create {}: {error}", cwd.display()))
                })?;
            rustix::process::chdir(cwd).map_err(refused)?;
        }
        entered => entered.map_err(refused)?,
    }
    // Descriptors of the guest must not serve as a way out (CVE-2024-21626).
    let reached = rustix::process::getcwd(Vec::new()).map_err(refused)?;
    if reached.to_bytes().first() != Some(&b'/') {
        return Err(Failure::invalid(
            "process.cwd",
            format!("{} is outside of the container", cwd.display()),
        ));
    }
    Ok(())
}

/// The environment, with HOME from the container's /etc/passwd if it isn't set.
pub fn environment(plan: &ProcessPlan) -> Vec<CString> {
    let mut env = plan.env.clone();
    if !env
        .iter()
        .any(|entry| entry.to_bytes().starts_with(b"HOME="))
    {
        let home = home_of(plan.uid).unwrap_or_else(|| "/".to_owned());
        env.push(CString::new(format!("HOME={home}")).unwrap_or_default());
    }
    env
}

fn home_of(uid: u32) -> Option<String> {
    // A container can put anything there, a FIFO for example.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/etc/passwd", flags, Mode::empty()).ok()?;
    let file = std::fs::File::from(file);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    home_in(BufReader::new(file.take(MAX_PASSWD)), uid)
}

/// The home folder of the first user with this id in a passwd(5) file.
fn home_in(passwd: impl BufRead, uid: u32) -> Option<String> {
    passwd.lines().map_while(Result::ok).find_map(|line| {
        let mut fields = line.split(':');
        let id: u32 = fields.nth(2)?.parse().ok()?;
        let home = fields.nth(2)?;
        (id == uid && !home.is_empty() && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::home_in;
    use proptest::prelude::*;

    #[test]
    fn finds_the_home_folder() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# broken\nweb:x:33:33::/var/www:/bin/false\nold:x:33:1::/x:\n";
        assert_eq!(home_in(passwd.as_bytes(), 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd.as_bytes(), 33).as_deref(), Some("/var/www"));
        assert_eq!(home_in(passwd.as_bytes(), 7), None);
        assert_eq!(home_in(&b"a:b"[..], 0), None);
    }

    proptest! {
        #[test]
        fn never_panics(passwd: Vec<u8>, uid: u32) {
            let _ = home_in(&passwd[..], uid);
        }
    }
}
