//! TCP, with Nagle's algorithm off: every message and batch is written whole.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mig_core::bitmap::PageRun;
use mig_core::{Blame, Fault, Side, Step};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{self, MsgFlags, sockopt};

use super::{Address, vectored};
use crate::memory::Pages;

/// How long one attempt to connect may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// A page channel's socket buffers within one host; the kernel doubles it, unless `net.core.rmem_max` and
/// `wmem_max` allow less. Chosen by measurement (docs/benchmarks).
const CACHED_BUFFER_BYTES: usize = 256 << 10;

/// A connection; clones share the socket and its counts.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: TcpStream,
    traffic: Arc<Traffic>,
    /// When whoever reads by this clone gives up.
    read_until: Mutex<Option<Instant>>,
}

/// Bytes that were handed to the socket, and taken from it: counted as they move, not by the message.
#[derive(Debug, Default)]
struct Traffic {
    written: AtomicU64,
    read: AtomicU64,
}

/// What is written behind a head.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part<'a> {
    /// Pages, as they are in guest memory.
    Pages(PageRun),
    /// Bytes of this program's own.
    Bytes(&'a [u8]),
}

/// Where something is read to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// Pages in guest memory.
    Pages(PageRun),
    /// So many of the bytes aside.
    Staged(usize),
}

impl Stream {
    fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, traffic: Arc::default(), read_until: Mutex::default() })
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let (socket, traffic) = (self.socket.try_clone()?, self.traffic.clone());
        Ok(Self { socket, traffic, read_until: Mutex::default() })
    }

    /// The other end, for messages to people.
    pub(crate) fn peer(&self) -> String {
        self.socket.peer_addr().map_or_else(|_| "unknown".into(), |a| a.to_string())
    }

    /// Bounds all reading from now on, however little comes at a time; `None` lets it wait.
    pub(crate) fn set_read_deadline(&self, deadline: Option<Duration>) -> io::Result<()> {
        *self.read_until() = deadline.map(|patience| Instant::now() + patience);
        self.socket.set_read_timeout(deadline)
    }

    /// Bounds every write from now on; `None` lets them wait.
    pub(crate) fn set_write_deadline(&self, deadline: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(deadline)
    }

    pub(crate) fn read_exact(&self, into: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < into.len() {
            match self.read(&mut into[filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Reads what is there: 0 at the end.
    pub(crate) fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let until = *self.read_until();
        if let Some(until) = until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
        }
        let count = (&self.socket).read(into)?;
        self.traffic.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    pub(crate) fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match (&self.socket).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.traffic.written.fetch_add(count as u64, Ordering::Relaxed);
                    bytes = &bytes[count..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes what there is room for, without waiting; how much that was.
    pub(crate) fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let count = socket::send(self.socket.as_raw_fd(), bytes, flags)?;
        self.traffic.written.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    /// Bytes that were read so far.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.traffic.read.load(Ordering::Relaxed)
    }

    /// Bytes written so far, and how many of them the peer's host has not acknowledged.
    pub(crate) fn written_bytes(&self) -> (u64, u64) {
        // the queue first: what is written in between then only looks acknowledged later
        let queued = vectored::unacknowledged_bytes(self.socket.as_fd());
        let written = self.traffic.written.load(Ordering::Relaxed);
        (written, queued.min(written))
    }

    /// Whether something can be read at once, the end included.
    pub(crate) fn has_unread(&self) -> bool {
        let mut ears = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut ears, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether both ends are on this host.
    fn is_within_host(&self) -> bool {
        match (self.socket.local_addr(), self.socket.peer_addr()) {
            (Ok(here), Ok(there)) => here.ip() == there.ip() || there.ip().is_loopback(),
            _ => false,
        }
    }

    /// Chooses the buffers of one of `channels` page channels. Between hosts the kernel's own tuning knows the
    /// link best. Within one host the link is the cores' caches: while several channels keep every core busy,
    /// what is on its way had better stay in them. A single channel needs the slack, to keep both its ends busy.
    pub(crate) fn fit_to_pages(&self, channels: usize) -> io::Result<()> {
        if channels > 1 && self.is_within_host() {
            socket::setsockopt(&self.socket, sockopt::SndBuf, &CACHED_BUFFER_BYTES)?;
            socket::setsockopt(&self.socket, sockopt::RcvBuf, &CACHED_BUFFER_BYTES)?;
        }
        Ok(())
    }

    /// Writes `head`, then the parts, pages straight from guest memory. Before each write `pace` is told how many bytes it
    /// would take, and says how many it may.
    pub(crate) fn write_pages<'a>(
        &self,
        head: &'a [u8],
        pages: &Pages,
        parts: impl Iterator<Item = Part<'a>>,
        vectors: &mut Vec<libc::iovec>,
        pace: impl FnMut(usize) -> usize,
    ) -> io::Result<()> {
        vectors.clear();
        let parts = std::iter::once(Part::Bytes(head)).chain(parts);
        vectors.extend(parts.map(|part| match part {
            Part::Pages(run) => pages.iovec(run),
            Part::Bytes(bytes) => {
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
            }
        }));
        #[allow(unsafe_code)]
        // SAFETY: the bytes are borrowed (`'a`) and `pages` keeps its mappings for the whole call.
        unsafe {
            vectored::write_all(self.socket.as_fd(), vectors, &self.traffic.written, pace)
        }
    }

    /// Reads pages straight into guest memory, and what does not belong there into `staged`, from its start on.
    ///
    /// # Panics
    /// When more is to be staged than there is room for.
    pub(crate) fn read_pages(
        &self,
        pages: &Pages,
        places: impl Iterator<Item = Place>,
        mut staged: &mut [u8],
        vectors: &mut Vec<libc::iovec>,
    ) -> io::Result<()> {
        vectors.clear();
        vectors.extend(places.map(|place| match place {
            Place::Pages(run) => pages.iovec(run),
            Place::Staged(bytes) => {
                let (part, left) = std::mem::take(&mut staged).split_at_mut(bytes);
                staged = left;
                libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() }
            }
        }));
        #[allow(unsafe_code)]
        // SAFETY: `pages` keeps its mappings for the whole call, and no Rust reference to them exists; the parts of
        // `staged` lie apart, and it is borrowed for the whole call and not used in it.
        unsafe {
            vectored::read_exact(self.socket.as_fd(), vectors, &self.traffic.read)
        }
    }

    fn read_until(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.read_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No more will be written; the peer reads what was, then the end.
    pub(crate) fn finish_writing(&self) {
        // an error means that it is closed already
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Ends every read that waits, in any thread; what is written still arrives.
    pub(crate) fn finish_reading(&self) {
        // an error means that it is closed already
        let _ = self.socket.shutdown(Shutdown::Read);
    }

    /// Ends every read and write that waits, in any thread.
    pub(crate) fn close(&self) {
        // an error means that it is closed already
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Connects to a receiver.
///
/// # Errors
/// The name does not resolve, nobody listens, or nobody answers in time.
pub(crate) fn connect(address: &Address) -> Result<Stream, Fault> {
    let fault = |blame, cause| Fault::new(Side::Source, Step::Connect, blame, cause);
    let candidates: Vec<SocketAddr> = (address.host.as_str(), address.port)
        .to_socket_addrs()
        .map_err(|e| {
            fault(Blame::Configuration, format!("cannot resolve {address}: {e}"))
                .remedy("check the host's name, or give its IP address")
        })?
        .collect();
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in candidates {
        match TcpStream::connect_timeout(&candidate, CONNECT_DEADLINE).and_then(Stream::new) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    if matches!(last.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
        return Err(fault(Blame::Local, format!("cannot connect to {address}: {last}"))
            .remedy("allow this process more open files (ulimit -n), or use fewer channels"));
    }
    Err(fault(Blame::Network, format!("cannot connect to {address}: {last}"))
        .remedy("start mig-recv there, and check the port and firewalls between"))
}

/// A receiver's ear.
#[derive(Debug)]
pub(crate) struct Ear {
    listener: TcpListener,
    address: Address,
}

impl Ear {
    /// Listens. Port 0 takes a free one; see [`Ear::address`].
    pub(crate) fn bind(address: &Address) -> Result<Self, Fault> {
        let fault = |e: io::Error| {
            let cause = format!("cannot listen on {address}: {e}");
            Fault::new(Side::Destination, Step::Connect, Blame::Configuration, cause)
                .remedy("choose an address of this host and a free port; port 0 takes any")
        };
        let listener = TcpListener::bind((address.host.as_str(), address.port)).map_err(fault)?;
        listener.set_nonblocking(true).map_err(fault)?;
        let local = listener.local_addr().map_err(fault)?;
        Ok(Self { listener, address: Address::tcp(local.ip().to_string(), local.port()) })
    }

    /// Where it listens, with the port that was chosen.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection, if one comes within `patience`.
    pub(crate) fn accept(&self, patience: Duration) -> io::Result<Option<Stream>> {
        match self.listener.accept() {
            Ok((socket, _)) => return Stream::new(socket).map(Some),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        wait_readable(&self.listener, patience)?;
        Ok(None)
    }
}

/// Waits until the listener has something, or for `patience`.
fn wait_readable(listener: &TcpListener, patience: Duration) -> io::Result<()> {
    let mut ears = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(&mut ears, patience) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
