//! How pages travel: classified by the sender, described by the wire's run table.

pub(crate) mod zero;
