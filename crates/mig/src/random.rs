//! Random ids from the kernel.

use std::fs::File;
use std::io::{self, Read};

/// Sixteen bytes that nobody can guess.
pub(crate) fn id() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
