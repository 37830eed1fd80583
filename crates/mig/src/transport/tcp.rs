//! TCP, with Nagle's algorithm off: every message and batch is written whole.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::Duration;

use mig_core::bitmap::PageRun;
use mig_core::{Blame, Fault, Side, Step};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::{Address, vectored};
use crate::memory::Pages;

/// How long one attempt to connect may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// A connection; clones share the socket.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: TcpStream,
}

impl Stream {
    fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket })
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()? })
    }

    /// The other end, for messages to people.
    pub(crate) fn peer(&self) -> String {
        self.socket.peer_addr().map_or_else(|_| "unknown".into(), |a| a.to_string())
    }

    /// Bounds every read from now on; `None` lets them wait.
    pub(crate) fn set_read_deadline(&self, deadline: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(deadline)
    }

    /// Bounds every write from now on; `None` lets them wait.
    pub(crate) fn set_write_deadline(&self, deadline: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(deadline)
    }

    pub(crate) fn read_exact(&self, into: &mut [u8]) -> io::Result<()> {
        (&self.socket).read_exact(into)
    }

    /// Reads what is there: 0 at the end.
    pub(crate) fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        (&self.socket).read(into)
    }

    pub(crate) fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.socket).write_all(bytes)
    }

    /// Writes `head`, then pages straight from guest memory.
    pub(crate) fn write_pages(
        &self,
        head: &[u8],
        pages: &Pages,
        runs: impl Iterator<Item = PageRun>,
        vectors: &mut Vec<libc::iovec>,
    ) -> io::Result<()> {
        vectors.clear();
        vectors.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        vectors.extend(runs.map(|run| pages.iovec(run)));
        #[allow(unsafe_code)]
        // SAFETY: `head` is borrowed and `pages` keeps its mappings for the whole call.
        unsafe {
            vectored::write_all(self.socket.as_fd(), vectors)
        }
    }

    /// Reads pages straight into guest memory.
    pub(crate) fn read_pages(
        &self,
        pages: &Pages,
        runs: impl Iterator<Item = PageRun>,
        vectors: &mut Vec<libc::iovec>,
    ) -> io::Result<()> {
        vectors.clear();
        vectors.extend(runs.map(|run| pages.iovec(run)));
        #[allow(unsafe_code)]
        // SAFETY: `pages` keeps its mappings for the whole call, and no Rust reference to them exists.
        unsafe {
            vectored::read_exact(self.socket.as_fd(), vectors)
        }
    }

    /// No more will be written; the peer reads what was, then the end.
    pub(crate) fn finish_writing(&self) {
        // an error means that it is closed already
        let _ = self.socket.shutdown(Shutdown::Write);
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
