//! Bytes to frames and state sections, and back: the whole wire format, and nothing that waits or reads.
//!
//! Little-endian throughout. Every frame starts with a fixed [`header`] that carries its own CRC32C; every
//! count and length that a peer may claim has a named bound, checked before anything is allocated for it.
//! Nothing here panics on a peer's bytes.
#![forbid(unsafe_code)]

pub mod body;
pub mod bytes;
pub mod describe;
pub mod fault;
pub mod frame;
pub mod header;
pub mod hello;
pub mod pages;
pub mod section;

pub use bytes::WireError;
pub use describe::{Description, Refusal};
pub use fault::{Blame, Fault, Side, Step};
pub use frame::Message;
pub use header::{HEADER_BYTES, Header, Kind};
pub use section::Section;
