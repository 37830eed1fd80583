//! What a peer's bytes may cost at most.

/// Bytes that reading a frame of `body_bytes` may allocate beside those bytes.
///
/// The content once, and for every item its struct, in vectors that grow by doubling: at most 24 bytes for
/// each byte of the smallest items, at most half a megabyte for as many items as their limits allow.
pub fn decoding(body_bytes: usize) -> usize {
    (24 * body_bytes).min(body_bytes + (512 << 10)) + (4 << 10)
}

/// Bytes that a machine may allocate at a time to handle a message that holds `message_bytes`, beside
/// `own_bytes` of its own configuration: what it keeps, says and reports of it.
pub fn handling(message_bytes: usize, own_bytes: usize) -> usize {
    6 * message_bytes + 2 * own_bytes + (32 << 10)
}

/// Bytes that a source's machine may keep beside its configuration: texts of one fault.
pub const SOURCE_KEEPS: usize = 16 << 10;

/// Bytes that a destination's machine may keep: one State of `state_bytes`, a digest for each chunk of the guest
/// it accepted (in a vector that grows by doubling), texts of one fault.
pub fn destination_keeps(state_bytes: usize, chunks: u64) -> usize {
    let digests = usize::try_from(chunks).unwrap_or(usize::MAX).saturating_mul(2 * size_of::<u64>());
    state_bytes.saturating_add(digests).saturating_add(16 << 10)
}

/// Bytes that reading a section's body of `body_bytes` and writing it out as text may allocate: serde sets
/// aside at most 1 MiB for each vector whose length a peer claims (serde's `size_hint::cautious`), and
/// text takes several characters for a byte.
pub fn section(body_bytes: usize) -> usize {
    32 * body_bytes + (3 << 20)
}

/// Bytes that decoding the pages of an encoded run may allocate: the most there can be of them, and an error's text.
pub const DECODED_PAGES: usize = (128 << 10) + (4 << 10);

/// What a machine does by itself for one message, until it waits for the peer again.
pub const COMPLETIONS_PER_MESSAGE: usize = 16;

/// What a machine asks for in one transition.
pub const ACTIONS_PER_TRANSITION: usize = 8;
