//! The dirtier.
use super::asm::Code;
use super::image::{Machine, Piece};
use super::{Guest, Memory, WorkloadError};

pub(super) fn program(_: &Guest, _: &Machine, _: &mut [u8]) -> Result<(Code, Vec<Piece>), WorkloadError> {
    Ok((super::idle::program()?, Vec::new()))
}
pub(super) fn stamp(_: &Guest, _: &Memory, _: &Machine) -> Result<(), WorkloadError> {
    Ok(())
}
pub(super) fn verify(_: &Guest, _: &Memory, _: &Machine) -> Result<u64, WorkloadError> {
    Ok(0)
}
