//! Reading and writing sockets from and to guest memory: the kernel copies, so no Rust reference is made.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// What one call takes at most (`UIO_MAXIOV` in the kernel's include/uapi/linux/uio.h).
const MAX_VECTORS: usize = 1024;

/// Writes all of `vectors`, which are used up, adding the bytes to `moved` as they go. Before each call `pace` is told
/// how many bytes it would take, and says how many it may.
///
/// # Safety
/// Each vector is mapped readable memory for the whole call.
pub(super) unsafe fn write_all(
    fd: BorrowedFd<'_>,
    vectors: &mut [libc::iovec],
    moved: &AtomicU64,
    pace: impl FnMut(usize) -> usize,
) -> io::Result<()> {
    transfer(vectors, moved, pace, |part| {
        // SAFETY: the caller vouches for the memory; the count is within the slice; a zeroed `msghdr` has no
        // address and no control data.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = part.as_ptr().cast_mut();
            message.msg_iovlen = part.len();
            // not writev: a peer that is gone must not end an embedder's process by SIGPIPE
            libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
        }
    })
}

/// Fills all of `vectors`, which are used up, adding the bytes to `moved` as they come.
///
/// # Safety
/// Each vector is mapped writable memory for the whole call, with no Rust reference to it.
pub(super) unsafe fn read_exact(
    fd: BorrowedFd<'_>,
    vectors: &mut [libc::iovec],
    moved: &AtomicU64,
) -> io::Result<()> {
    transfer(
        vectors,
        moved,
        |wanted| wanted,
        |part| {
            // SAFETY: the caller vouches for the memory; the count is within the slice.
            unsafe { libc::readv(fd.as_raw_fd(), part.as_ptr(), part.len() as libc::c_int) }
        },
    )
}

/// Bytes written to a TCP socket that the peer's host has not acknowledged (SIOCOUTQ, which is TIOCOUTQ, in
/// tcp(7)); none where that is not known.
pub(super) fn unacknowledged_bytes(fd: BorrowedFd<'_>) -> u64 {
    let mut queued: libc::c_int = 0;
    // SAFETY: the call writes one int, to `queued`.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    if done == 0 { u64::try_from(queued).unwrap_or(0) } else { 0 }
}

fn transfer(
    mut vectors: &mut [libc::iovec],
    total: &AtomicU64,
    mut pace: impl FnMut(usize) -> usize,
    mut call: impl FnMut(&[libc::iovec]) -> isize,
) -> io::Result<()> {
    loop {
        let empty = vectors.iter().take_while(|v| v.iov_len == 0).count();
        vectors = &mut vectors[empty..];
        if vectors.is_empty() {
            return Ok(());
        }
        let count = vectors.len().min(MAX_VECTORS);
        let wanted = vectors[..count].iter().map(|v| v.iov_len).sum();
        let moved = with_at_most(&mut vectors[..count], pace(wanted).clamp(1, wanted), &mut call);
        match moved {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            moved if moved > 0 => {
                total.fetch_add(moved as u64, Ordering::Relaxed);
                advance(vectors, moved as usize);
            }
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

/// Calls with the first `bytes` of the vectors, of which there are at least as many.
fn with_at_most(
    vectors: &mut [libc::iovec],
    bytes: usize,
    call: impl FnOnce(&[libc::iovec]) -> isize,
) -> isize {
    let mut before = 0;
    for (index, length) in vectors.iter().map(|v| v.iov_len).enumerate() {
        if before + length >= bytes {
            vectors[index].iov_len = bytes - before;
            let moved = call(&vectors[..=index]);
            vectors[index].iov_len = length;
            return moved;
        }
        before += length;
    }
    call(vectors)
}

/// Takes `moved` bytes off the front.
fn advance(vectors: &mut [libc::iovec], mut moved: usize) {
    for vector in vectors {
        let part = moved.min(vector.iov_len);
        // wrapping, since the result may be one past the end of the vector's memory
        vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(part).cast();
        vector.iov_len -= part;
        moved -= part;
        if moved == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn vectors(buffer: &mut [u8], pieces: &[usize]) -> Vec<libc::iovec> {
        let mut rest = buffer;
        let mut vectors = Vec::new();
        for piece in pieces {
            let (part, tail) = rest.split_at_mut(*piece);
            vectors.push(libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
            rest = tail;
        }
        vectors
    }

    #[test]
    fn more_vectors_and_bytes_than_one_call_takes_arrive_in_order() {
        arrive_in_order(|wanted| wanted);
    }

    #[test]
    fn a_few_bytes_at_a_time_arrive_in_order_too() {
        let mut turn = 0;
        arrive_in_order(move |wanted| {
            turn += 1;
            [0, 1, 350, 351, 7000, wanted, wanted + 1][turn % 7]
        });
    }

    fn arrive_in_order(pace: impl FnMut(usize) -> usize + Send + 'static) {
        let (mut here, there) = UnixStream::pair().unwrap();
        let pieces: Vec<usize> = (0..3000).map(|i| i % 700).collect();
        let bytes: Vec<u8> = (0..pieces.iter().sum::<usize>()).map(|i| (i / 251 % 256) as u8).collect();
        let mut copy = bytes.clone();
        let writer = std::thread::spawn(move || {
            let mut vectors = vectors(&mut copy, &pieces);
            // SAFETY: the vectors point into `copy`, which outlives the call.
            unsafe { write_all(there.as_fd(), &mut vectors, &AtomicU64::new(0), pace) }
        });
        let mut received = Vec::new();
        here.read_to_end(&mut received).unwrap();
        writer.join().unwrap().unwrap();
        assert!(received == bytes);
    }

    #[test]
    fn a_peer_that_goes_early_is_an_error_and_no_endless_loop() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&[1, 2, 3]).unwrap();
        drop(here);
        let mut buffer = [0; 10];
        let mut vectors = vectors(&mut buffer, &[2, 0, 8]);
        let moved = AtomicU64::new(0);
        // SAFETY: the vectors point into `buffer`, which outlives the call and is not used meanwhile.
        let error = unsafe { read_exact(there.as_fd(), &mut vectors, &moved) }.unwrap_err();
        assert_eq!((error.kind(), moved.into_inner()), (io::ErrorKind::UnexpectedEof, 3));
    }
}
