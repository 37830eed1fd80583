//! What bytes travel over. Nothing outside this module knows sockets.

mod address;
mod tcp;
mod vectored;

pub use address::{Address, AddressError};
pub(crate) use tcp::{Ear, Part, Place, Stream, connect};
