//! What the targets share.

use libfuzzer_sys::fuzzer_mutate;
use mig_hostile::mutate;

/// libFuzzer's own mutation; three inputs in four are then sealed again, since a checksum would turn away nearly
/// all of them otherwise.
pub fn mutated(bytes: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let size = fuzzer_mutate(bytes, size, max_size);
    if seed % 4 == 0 {
        return size;
    }
    let sealed = mutate::seal(&bytes[..size]);
    match bytes.get_mut(..sealed.len().min(max_size)) {
        Some(room) if room.len() == sealed.len() => {
            room.copy_from_slice(&sealed);
            sealed.len()
        }
        _ => size,
    }
}
