//! The inside of a state section: serde types as bincode, with a limit and no byte left over.
//!
//! The only place that knows bincode, whose authors have stopped: replacing it means this file and new
//! schema versions.

use serde::{Serialize, de::DeserializeOwned};

use crate::bytes::WireError;
use crate::section::MAX_BODY_BYTES;

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_BODY_BYTES>()
}

/// Serialises a saved state type of our own.
///
/// # Panics
/// When the type cannot be serialised at all or exceeds [`MAX_BODY_BYTES`]: saved types are plain data.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, config()).expect("saved state types are plain, bounded data")
}

/// Reads a saved state type back; `what` names it in errors.
///
/// # Errors
/// [`WireError::Body`] when the bytes do not form a `T`, [`WireError::Unread`] when some are left over.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    let (value, consumed) = bincode::serde::decode_from_slice(bytes, config())
        .map_err(|e| WireError::Body { what, cause: e.to_string() })?;
    match bytes.len() - consumed {
        0 => Ok(value),
        left => Err(WireError::Unread { what, left }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_comes_back_and_leftovers_are_refused() {
        let mut bytes = encode(&(7u32, vec![1u64, 2]));
        assert_eq!(decode::<(u32, Vec<u64>)>("pair", &bytes).unwrap(), (7, vec![1, 2]));
        bytes.push(0);
        assert!(matches!(decode::<(u32, Vec<u64>)>("pair", &bytes), Err(WireError::Unread { left: 1, .. })));
    }

    #[test]
    fn a_claimed_length_of_2_to_the_60_allocates_nothing_and_is_an_error() {
        let bytes = (1u64 << 60).to_le_bytes();
        assert!(matches!(decode::<Vec<u8>>("bytes", &bytes), Err(WireError::Body { .. })));
        assert!(matches!(decode::<Vec<[u64; 8]>>("words", &bytes), Err(WireError::Body { .. })));
    }
}
