//! Pseudo-terminals, allocated in the container's own devpts.

use crate::error::{Context, Failure, Kind};
use crate::syscalls::Syscalls;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    rows: u16,
    columns: u16,
}

impl WindowSize {
    /// Checks what the host asks for; `None` when it leaves the size alone.
    pub fn new(rows: u32, columns: u32) -> Result<Option<Self>, Failure> {
        if rows == 0 && columns == 0 {
            return Ok(None);
        }
        match (u16::try_from(rows), u16::try_from(columns)) {
            (Ok(rows), Ok(columns)) => Ok(Some(Self { rows, columns })),
            _ => Err(Failure::invalid(
                "the terminal's size",
                format!("{rows} rows and {columns} columns; at most 65535 each"),
            )),
        }
    }

    /// Rows and columns.
    pub fn cells(self) -> (u16, u16) {
        (self.rows, self.columns)
    }

    /// Sets it, and lets the terminal's foreground processes know.
    pub fn apply(self, terminal: BorrowedFd<'_>) -> Result<(), Failure> {
        let size = Winsize {
            ws_row: self.rows,
            ws_col: self.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(terminal, size).context(|| "set the terminal's size")
    }
}

/// Opens a new pair of master and slave through /dev/ptmx of the calling process's root.
pub fn open(size: Option<WindowSize>, uid: u32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let action = || "open a terminal through /dev/ptmx in the container";
    // Non-blocking, since a running container can have put anything in its place.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/ptmx", flags, Mode::empty()).context(action)?;
    let stat = rustix::fs::fstat(&master).context(action)?;
    // Major 5, minor 2: the kernel's list of devices.
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
        || stat.st_rdev != rustix::fs::makedev(5, 2)
    {
        return Err(Failure::new(
            Kind::InvalidArgument,
            format!("{}: it is something else", action()),
        ));
    }
    rustix::pty::unlockpt(&master).context(action)?;
    // By descriptor: a name under /dev/pts could be covered by something else.
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, peer).context(action)?;
    if let Some(size) = size {
        size.apply(slave.as_fd())?;
    }
    if uid != 0 {
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)
            .context(|| "give the terminal to the process's user")?;
    }
    Ok((master, slave))
}

/// Makes `slave` the controlling terminal and standard input, output and error. The calling
/// process must be a session leader.
pub fn take(slave: BorrowedFd<'_>) -> Result<(), Failure> {
    rustix::process::ioctl_tiocsctty(slave)
        .and_then(|()| rustix::stdio::dup2_stdin(slave))
        .and_then(|()| rustix::stdio::dup2_stdout(slave))
        .and_then(|()| rustix::stdio::dup2_stderr(slave))
        .context(|| "take the terminal as controlling terminal")
}

/// Shows the terminal as the container's /dev/console. `root` is the container's root.
pub fn mount_console(
    sys: &dyn Syscalls,
    root: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
) -> Result<(), Failure> {
    let copy = sys
        .clone_mount(slave, false)
        .context(|| "clone the mount of the terminal")?;
    let place = crate::rootfs::file_place(sys, root, Path::new("/dev/console"))?;
    sys.attach(copy.as_fd(), place.as_fd())
        .context(|| "mount the terminal on /dev/console in the rootfs")
}
