//! An arbiter that is a small file on storage which both hosts share.
//!
//! Who may run the guest is what the file says, and it is changed under a lock only.
//!
//! **One decides at a time.** Reading, deciding and writing happen under an exclusive OFD lock (fcntl(2)) on
//! the file. It belongs to the open file description, so it keeps threads of one process apart as well, and the
//! kernel drops it when its holder dies. It is waited for a few seconds at most: a holder that is frozen is an
//! error, not a hang.
//!
//! **A decision outlives a crash.** A side is told yes only after it has written so itself and `fdatasync` has
//! come back. That holds for a claim that is repeated too: what an earlier one has written may be in the page
//! cache only, when the process died before, or when its `fdatasync` failed (which leaves the page clean).
//! The file keeps its length and its place: there is no rename, so the lock and every opener stay with one
//! inode, and no other host can find an older file in a cached directory. Instead there are two records, and
//! the one that counts is never written over. A write that is torn, at any byte, by a crash of the process, the
//! host or the server therefore leaves the decision before it; the side whose write that was has not been told
//! yes. Only a medium that loses what it has confirmed can lose a decision.
//!
//! **NFS.** Both hosts must see the same file. Locks on NFS are held by the server (NFSv4 itself, NLM for v3);
//! taking one drops what the client has cached of the file and giving it back sends what was written. Mounted
//! with `nolock` or `local_lock=all|posix` the hosts lock each for itself: do not. A client that was cut off so
//! long that its lock has gone gets EIO for every read and write through it (fcntl(2), "Lost locks"), unless
//! `nfs.recover_lost_locks` is set: then a host that was away for longer could write a decision that another
//! has made meanwhile, so leave it off. A file on a hard mount whose server is away hangs whoever asks.
//!
//! A *copy* of a lease has its id, and cannot be told from it: two sides with a copy each are each told yes.
//! Never copy one, nor put one back from a backup while a migration is under way. A lease that was replaced by
//! another since it was opened is refused.
//!
//! **Cost.** A destination claims inside the downtime. On ext4 on a virtual disk (Linux 6.18, 2000 claims) a yes
//! took 0.12 ms, 0.24 ms in the 99th percentile and 3.8 ms at most, nearly all of it `fdatasync`; a no 5 µs;
//! without a disk (tmpfs) 4 µs. A disk that writes its cache out takes what that takes, and a server a round
//! trip or two more for the lock.

mod register;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mig_core::Side;
use mig_wire::hello::SessionId;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use thiserror::Error;

use self::register::{Change, LEASE_BYTES, LeaseId, Register, Unreadable};
use super::Arbiter;
use crate::guest::BoxError;
use crate::random;

/// How long the lock is waited for. A holder needs it for one read and one write.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// The longest pause between two attempts to take it.
const LOCK_INTERVAL_MAX: Duration = Duration::from_millis(20);

/// A lease file. Holds no file open between calls; see [`Arbiter`] for what it promises.
#[derive(Debug, Clone)]
pub struct LeaseFile {
    path: PathBuf,
    id: LeaseId,
    lock_patience: Duration,
    /// `fdatasync`, but in tests.
    make_durable: fn(&File) -> io::Result<()>,
}

/// Why a lease file could not be used. Nothing was changed, unless [`LeaseError::Io`] says that writing failed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum LeaseError {
    #[error("cannot {what} the lease file {}", path.display())]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error("{} is no lease file", path.display())]
    NotALease { path: PathBuf },
    #[error("the lease file {} is damaged", path.display())]
    Damaged { path: PathBuf },
    #[error("the lease file {} has been replaced by another since it was opened", path.display())]
    Replaced { path: PathBuf },
    #[error("the lease file {} has been locked by somebody else for {waited:?}", path.display())]
    Locked { path: PathBuf, waited: Duration },
    #[error("the session that is to begin has been decided in the lease file {} before", path.display())]
    Decided { path: PathBuf },
    #[error("the lease file {} has been written 2^64 times", path.display())]
    WornOut { path: PathBuf },
}

impl LeaseError {
    /// What somebody can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Io { .. } => "see that the directory exists, and that the program may read and write there",
            Self::NotALease { .. } => "name a lease file, or a file that does not exist yet: it is created",
            Self::Damaged { .. } => {
                "make sure that at most one side runs the guest; then remove the file: a new one is created"
            }
            Self::Replaced { .. } => "give both programs one lease file, and leave it in its place",
            Self::Locked { .. } => {
                "find the program that holds it (lslocks), on each host, and continue or end it"
            }
            Self::Decided { .. } => "migrate again: it begins another session",
            Self::WornOut { .. } => "name another lease file",
        }
    }
}

impl LeaseFile {
    /// Opens the lease file at `path`, or creates it, readable and writable by its owner only. Of several that
    /// create it at once all get the same.
    ///
    /// # Errors
    /// The file is there and no lease, or cannot be used; it is unchanged then.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LeaseError> {
        let path = std::path::absolute(path.as_ref()).map_err(|source| LeaseError::Io {
            path: path.as_ref().into(),
            what: "find",
            source,
        })?;
        let mut lease =
            Self { path, id: [0; 16], lock_patience: LOCK_PATIENCE, make_durable: File::sync_data };
        if let Err(e) = lease.open_file()
            && e.kind() == io::ErrorKind::NotFound
        {
            lease.create().map_err(lease.io("create"))?;
        }
        lease.id = lease.read(&lease.locked()?)?.id;
        // The name too must outlive a crash, whoever has made it.
        lease.sync_directory().map_err(lease.io("keep the name of"))?;
        Ok(lease)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn begin(&self, session: &SessionId) -> Result<(), LeaseError> {
        let file = self.locked()?;
        let register = self.current(&file)?;
        if register.session == *session && register.owner.is_some() {
            return Err(LeaseError::Decided { path: self.path.clone() });
        }
        self.write(&file, register.change(*session, None))
    }

    fn claim(&self, session: &SessionId, side: Side) -> Result<bool, LeaseError> {
        let file = self.locked()?;
        let register = self.current(&file)?;
        if register.session != *session || register.owner.is_some_and(|owner| owner != side) {
            return Ok(false);
        }
        self.write(&file, register.change(*session, Some(side)))?;
        Ok(true)
    }

    /// The file, with its lock, which goes when it is dropped.
    fn locked(&self) -> Result<File, LeaseError> {
        let file = self.open_file().map_err(self.io("open"))?;
        let whole = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let started = Instant::now();
        let mut interval = Duration::from_micros(100);
        loop {
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
                Ok(_) => return Ok(file),
                Err(Errno::EAGAIN | Errno::EACCES) if started.elapsed() < self.lock_patience => {
                    std::thread::sleep(interval);
                    interval = (interval * 2).min(LOCK_INTERVAL_MAX);
                }
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    return Err(LeaseError::Locked { path: self.path.clone(), waited: self.lock_patience });
                }
                Err(Errno::EINTR) => {}
                Err(e) => return Err(self.io("lock")(e.into())),
            }
        }
    }

    fn open_file(&self) -> io::Result<File> {
        // Not to wait where it is a device, a serial line without a carrier for example.
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&self.path)
    }

    /// What the file says, if it is still the one that was opened.
    fn current(&self, file: &File) -> Result<Register, LeaseError> {
        let register = self.read(file)?;
        if register.id != self.id {
            return Err(LeaseError::Replaced { path: self.path.clone() });
        }
        Ok(register)
    }

    fn read(&self, file: &File) -> Result<Register, LeaseError> {
        // One byte more than there should be: enough to see that there are more.
        let mut bytes = [0; LEASE_BYTES + 1];
        let mut length = 0;
        while length < bytes.len() {
            match file.read_at(&mut bytes[length..], length as u64) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.io("read")(e)),
            }
        }
        Register::read(&bytes[..length]).map_err(|unreadable| match unreadable {
            Unreadable::NotALease => LeaseError::NotALease { path: self.path.clone() },
            Unreadable::Damaged => LeaseError::Damaged { path: self.path.clone() },
        })
    }

    /// Comes back when it is durable.
    fn write(&self, file: &File, change: Option<Change>) -> Result<(), LeaseError> {
        let change = change.ok_or_else(|| LeaseError::WornOut { path: self.path.clone() })?;
        file.write_all_at(&change.record, change.offset as u64).map_err(self.io("write"))?;
        (self.make_durable)(file).map_err(self.io("write"))
    }

    /// Puts a new lease in its place, whole; or leaves what somebody else has put there meanwhile.
    fn create(&self) -> io::Result<()> {
        let (id, nobodys) = (random::id()?, random::id()?);
        let mut name = std::ffi::OsString::from(".");
        name.push(self.path.file_name().unwrap_or_default());
        name.push(format!(".{:032x}", u128::from_be_bytes(random::id()?)));
        let draft = self.path.with_file_name(name);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&draft)?;
        let placed = file
            .write_all_at(&Register::create(id, nobodys), 0)
            .and_then(|()| file.sync_all())
            .and_then(|()| match std::fs::hard_link(&draft, &self.path) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            });
        std::fs::remove_file(&draft)?;
        placed
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()
    }

    fn io(&self, what: &'static str) -> impl Fn(io::Error) -> LeaseError + use<> {
        let path = self.path.clone();
        move |source| LeaseError::Io { path: path.clone(), what, source }
    }
}

impl Arbiter for LeaseFile {
    fn identity(&self) -> [u8; 16] {
        self.id
    }

    fn begin(&self, session: &SessionId) -> Result<(), BoxError> {
        Ok(Self::begin(self, session)?)
    }

    fn claim(&self, session: &SessionId, side: Side) -> Result<bool, BoxError> {
        Ok(Self::claim(self, session, side)?)
    }
}

#[cfg(test)]
mod tests;
