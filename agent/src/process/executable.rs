//! Finds the program to execute, with the messages that users know from runc.

use crate::error::{Failure, Kind};
use rustix::fs::{Access, AtFlags, CWD, FileType};
use rustix::io::Errno;
use std::ffi::{CStr, CString};

/// Searched when the process's environment has no PATH.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The path of `name`, as the calling process sees it and may execute it.
pub fn find(name: &CStr, env: &[CString]) -> Result<CString, Failure> {
    let shown = name.to_string_lossy();
    if name.to_bytes().contains(&b'/') {
        return match check(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(Problem::Stat(error)) => Err(Failure::new(
                kind_of(error),
                format!("exec: \"{shown}\": stat {shown}: {}", words(error)),
            )),
            Err(Problem::NotExecutable(error)) => Err(Failure::new(
                kind_of(error),
                format!("exec: \"{shown}\": {}", words(error)),
            )),
        };
    }
    let search = env
        .iter()
        .find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH);
    // An empty entry would be the working directory; runc finds nothing there either.
    for folder in search
        .split(|byte| *byte == b':')
        .filter(|folder| folder.starts_with(b"/"))
    {
        let candidate = CString::new([folder, b"/", name.to_bytes()].concat()).unwrap_or_default();
        if check(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(Failure::new(
        Kind::NotFound,
        format!("exec: \"{shown}\": executable file not found in $PATH"),
    ))
}

/// Why the kernel didn't execute what [`find`] had found.
pub fn refused(path: &CStr, error: Errno) -> Failure {
    Failure::new(
        kind_of(error),
        format!("exec {}: {}", path.to_string_lossy(), words(error)),
    )
}

enum Problem {
    Stat(Errno),
    NotExecutable(Errno),
}

fn check(path: &CStr) -> Result<(), Problem> {
    let allowed = rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS);
    if !matches!(allowed, Ok(()) | Err(Errno::ACCESS)) {
        return allowed.map_err(Problem::Stat);
    }
    let stat = rustix::fs::stat(path).map_err(Problem::Stat)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Problem::NotExecutable(Errno::ISDIR));
    }
    allowed.map_err(Problem::NotExecutable)
}

fn kind_of(error: Errno) -> Kind {
    match error {
        Errno::NOENT | Errno::NOTDIR => Kind::NotFound,
        Errno::ACCESS | Errno::ISDIR | Errno::NOEXEC | Errno::LOOP | Errno::PERM => {
            Kind::InvalidArgument
        }
        _ => Kind::Internal,
    }
}

/// The error in runc's words, which orchestrators look for.
fn words(error: Errno) -> String {
    match error {
        Errno::NOENT => "no such file or directory".to_owned(),
        Errno::NOTDIR => "not a directory".to_owned(),
        Errno::ACCESS => "permission denied".to_owned(),
        Errno::PERM => "operation not permitted".to_owned(),
        Errno::ISDIR => "is a directory".to_owned(),
        Errno::NOEXEC => "exec format error".to_owned(),
        Errno::LOOP => "too many levels of symbolic links".to_owned(),
        Errno::TOOBIG => "argument list too long".to_owned(),
        Errno::TXTBSY => "text file busy".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn message(name: &str, env: &[CString]) -> String {
        let name = CString::new(name).expect("a name");
        find(&name, env).expect_err("not found").message
    }

    #[test]
    fn speaks_like_runc() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("data");
        std::fs::write(&file, b"x").expect("a file");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("a mode");
        let file = file.display();
        assert_eq!(
            message("nope", &[]),
            "exec: \"nope\": executable file not found in $PATH"
        );
        assert_eq!(
            message("/no/such", &[]),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(
            message(&format!("{file}"), &[]),
            format!("exec: \"{file}\": permission denied")
        );
        assert_eq!(message("/tmp", &[]), "exec: \"/tmp\": is a directory");
    }

    #[test]
    fn searches_path() {
        let env = [
            c"A=b".to_owned(),
            c"PATH=:relative:/nowhere:/usr/bin:/bin".to_owned(),
        ];
        assert_eq!(
            find(c"sh", &env).as_deref().map(CStr::to_bytes),
            Ok(&b"/usr/bin/sh"[..])
        );
        assert!(find(c"sh", &[c"PATH=".to_owned()]).is_err());
        assert!(find(c"sh", &[]).is_ok());
    }
}
