//! What stands between a hostile FUSE client and the passthrough file system.
//!
//! The passthrough file system was written for a FUSE client that is a well-behaved kernel. This
//! layer sees each request after it was parsed, once, from guest memory, and
//!
//! - refuses names that are no single component of a path, `.` and `..` among them: nothing is
//!   ever looked up but a child of a folder;
//! - refuses open flags beyond those that have a meaning here. O_PATH above all: with it, creating
//!   a file would follow a symbolic link out of the share;
//! - refuses to make device nodes; opening existing ones is refused below (CVE-2020-35517 of
//!   virtiofsd);
//! - bounds the buffers whose size the client chooses;
//! - keeps an overlay's marks, which are trusted attributes in the guest, as others on the host;
//! - has the client look soon again at what the host may change, the volumes;
//! - keeps a folder with an overlay's upper layer and work folder as the host has made it;
//! - numbers files by their FUSE node ids. The host's inode numbers repeat among the file systems
//!   that are mounted below the share, which in the guest are one file system;
//! - lacks what is not forwarded: ioctl, poll, bmap, locks and DAX mappings are answered ENOSYS. So
//!   is FLUSH, after which Linux spares itself a message for each close(2): without write-back
//!   there is nothing left to fail then.

use super::checks::{check_flags, check_name, check_node};
use super::held::Held;
use super::volumes::Volumes;
use super::xattrs;
use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ROOT_ID, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;
use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long the client may use what it knows of a file in a volume. The host changes such files
/// while the guest runs: kubelet swaps a link when a ConfigMap changes.
const VOLUME_TIME: Duration = Duration::from_secs(1);
/// Longest read or write, and longest listing of a folder, in bytes.
pub const MAX_IO: u32 = 1 << 20;
/// XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux: no attribute or list of names is longer.
const MAX_XATTR: u32 = 64 << 10;
/// The guarded file system.
pub struct Guard {
    inner: PassthroughFs,
    /// What FUSE_INIT offered.
    capable: Mutex<Option<FsOptions>>,
    held: Held,
    volumes: Volumes,
}

pub(super) type Inode = u64;
type Handle = u64;

impl Guard {
    /// Guards `inner`.
    pub fn new(inner: PassthroughFs) -> Self {
        Guard {
            inner,
            capable: Mutex::new(None),
            held: Held::default(),
            volumes: Volumes::default(),
        }
    }

    /// What the client offered with FUSE_INIT; none before that.
    pub fn negotiated(&self) -> Option<FsOptions> {
        *self.capable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the client holds.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Takes note of an entry that goes to the client, and shows it as the client is to see it:
    /// with its number there, and for how long.
    fn given(&self, parent: Inode, name: &[u8], entry: Entry) -> Entry {
        self.held.given();
        self.volumes.given(parent, name, entry.inode);
        self.shown(parent, entry)
    }

    /// An entry at the top of the share is always looked up again. That is where the host adds and
    /// removes the containers' folders, while what is below belongs to the guest.
    fn shown(&self, parent: Inode, mut entry: Entry) -> Entry {
        entry.attr.st_ino = entry.inode;
        entry.attr_timeout = self.for_long(entry.inode, entry.attr_timeout);
        entry.entry_timeout = match parent {
            ROOT_ID => Duration::ZERO,
            _ => self.for_long(entry.inode, entry.entry_timeout),
        };
        entry
    }

    fn for_long(&self, inode: Inode, time: Duration) -> Duration {
        match self.volumes.has(inode) {
            true => time.min(VOLUME_TIME),
            false => time,
        }
    }
}

impl FileSystem for Guard {
    type Inode = Inode;
    type Handle = Handle;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let want = self.inner.init(capable)?;
        *self.capable.lock().unwrap_or_else(PoisonError::into_inner) = Some(capable);
        let want = want
            | FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::MAX_PAGES
            | FsOptions::CACHE_SYMLINKS;
        // There is no DAX window.
        Ok(want & !FsOptions::PERFILE_DAX)
    }

    fn destroy(&self) {
        self.inner.destroy();
        *self.capable.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.held.nothing();
        self.volumes.nothing();
    }

    fn lookup(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.inner
            .lookup(ctx, parent, name)
            .map(|entry| self.given(parent, name.to_bytes(), entry))
    }

    fn forget(&self, ctx: &Context, inode: Inode, count: u64) {
        self.held.forgotten(inode, count);
        self.volumes.forgotten(inode, count);
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(Inode, u64)>) {
        for &(inode, count) in &requests {
            self.held.forgotten(inode, count);
            self.volumes.forgotten(inode, count);
        }
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Option<Handle>,
    ) -> io::Result<(stat64, Duration)> {
        let (mut attr, timeout) = self.inner.getattr(ctx, inode, handle)?;
        attr.st_ino = inode;
        Ok((attr, self.for_long(inode, timeout)))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: Inode,
        attr: stat64,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.volumes.may_change(inode)?;
        let (mut attr, timeout) = self.inner.setattr(ctx, inode, attr, handle, valid)?;
        attr.st_ino = inode;
        Ok((attr, self.for_long(inode, timeout)))
    }

    fn readlink(&self, ctx: &Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    /// The target may be anything: only the guest ever follows it.
    fn symlink(
        &self,
        ctx: &Context,
        target: &CStr,
        parent: Inode,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.volumes.may_change(parent)?;
        check_name(name)?;
        self.inner
            .symlink(ctx, target, parent, name)
            .map(|entry| self.given(parent, name.to_bytes(), entry))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.volumes.may_change(parent)?;
        check_name(name)?;
        check_node(mode, rdev)?;
        self.inner
            .mknod(ctx, parent, name, mode, rdev, umask)
            .map(|entry| self.given(parent, name.to_bytes(), entry))
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.volumes.may_change(parent)?;
        check_name(name)?;
        self.inner
            .mkdir(ctx, parent, name, mode, umask)
            .map(|entry| self.given(parent, name.to_bytes(), entry))
    }

    fn unlink(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.volumes.may_change(parent)?;
        check_name(name)?;
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.volumes.may_change(parent)?;
        check_name(name)?;
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        old_parent: Inode,
        old_name: &CStr,
        new_parent: Inode,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.volumes.may_change(old_parent)?;
        self.volumes.may_change(new_parent)?;
        check_name(old_name)?;
        check_name(new_name)?;
        self.inner
            .rename(ctx, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, ctx: &Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry> {
        self.volumes.may_change(parent)?;
        check_name(name)?;
        self.inner
            .link(ctx, inode, parent, name)
            .map(|entry| self.given(parent, name.to_bytes(), entry))
    }

    fn open(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions, Option<u32>)> {
        // A client opens what exists; creating has a request of its own.
        let flags = check_flags(flags)? & !(libc::O_CREAT | libc::O_EXCL) as u32;
        let (handle, options, backing) = self.inner.open(ctx, inode, flags, fuse_flags)?;
        self.held.opened(handle);
        // An executable must not be read anew for each exec. With AUTO_INVAL_DATA the client drops
        // what it has cached once size or time of modification have changed.
        Ok((handle, options | OpenOptions::KEEP_CACHE, backing))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions, Option<u32>)> {
        self.volumes.may_change(parent)?;
        check_name(name)?;
        args.flags = check_flags(args.flags)?;
        let (entry, handle, options, backing) = self.inner.create(ctx, parent, name, args)?;
        self.held.opened(handle);
        let entry = self.given(parent, name.to_bytes(), entry);
        Ok((entry, handle, options, backing))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let flags = check_flags(flags)?;
        let size = size.min(MAX_IO);
        self.inner
            .read(ctx, inode, handle, writer, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let flags = check_flags(flags)?;
        let size = size.min(MAX_IO);
        self.inner.write(
            ctx, inode, handle, reader, size, offset, lock_owner, delayed, flags, fuse_flags,
        )
    }

    fn fsync(&self, ctx: &Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsync(ctx, inode, data, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.inner
            .fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        unlock: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner
            .release(ctx, inode, flags, handle, flush, unlock, lock_owner)?;
        self.held.closed();
        Ok(())
    }

    fn statfs(&self, ctx: &Context, inode: Inode) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.volumes.may_change(inode)?;
        let name = xattrs::to_host(name)?;
        self.inner.setxattr(ctx, inode, &name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: Inode,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let name = xattrs::to_host(name)?;
        self.inner.getxattr(ctx, inode, &name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        // Whole, to know how long it is in the guest's names.
        let list = match self.inner.listxattr(ctx, inode, MAX_XATTR)? {
            ListxattrReply::Names(list) => xattrs::to_guest(&list),
            count => return Ok(count),
        };
        let length = u32::try_from(list.len()).unwrap_or(u32::MAX);
        match size {
            0 => Ok(ListxattrReply::Count(length)),
            size if size < length => Err(io::Error::from_raw_os_error(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(list)),
        }
    }

    fn removexattr(&self, ctx: &Context, inode: Inode, name: &CStr) -> io::Result<()> {
        self.volumes.may_change(inode)?;
        let name = xattrs::to_host(name)?;
        self.inner.removexattr(ctx, inode, &name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let flags = check_flags(flags)? & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) as u32;
        let (handle, options) = self.inner.opendir(ctx, inode, flags)?;
        self.held.opened(handle);
        Ok((handle, options))
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let size = size.min(MAX_IO);
        self.inner
            .readdir(ctx, inode, handle, size, offset, add_entry)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let size = size.min(MAX_IO);
        self.inner
            .readdirplus(ctx, inode, handle, size, offset, &mut |mut name, entry| {
                name.ino = entry.inode;
                let found = entry.inode;
                let entry = self.given(inode, name.name, entry);
                let added = add_entry(name, entry);
                // 0 if there was no room for it: the server below forgets it again.
                if !added.as_ref().is_ok_and(|&len| len > 0) {
                    self.held.forgotten(found, 1);
                    self.volumes.forgotten(found, 1);
                }
                added
            })
    }

    fn fsyncdir(&self, ctx: &Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, data, handle)
    }

    fn releasedir(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
    ) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, flags, handle)?;
        self.held.closed();
        Ok(())
    }

    fn access(&self, ctx: &Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
