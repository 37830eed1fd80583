//! What bytes travel over. Nothing outside this module knows sockets.

mod address;
mod tcp;

pub use address::{Address, AddressError};
pub use tcp::Listener;
