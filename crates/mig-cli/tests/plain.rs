//! What a plain build of the programs does not have.

#![allow(missing_docs)]
#![cfg(not(feature = "fault-points"))]

#[test]
fn programs_have_no_fault_points_unless_they_are_built_for_tests_of_faults() {
    for program in [env!("CARGO_BIN_EXE_mig-send"), env!("CARGO_BIN_EXE_mig-recv")] {
        let bytes = std::fs::read(program).unwrap();
        let says = |words: &[u8]| bytes.windows(words.len()).any(|w| w == words);
        assert!(says(b"XDG_RUNTIME_DIR"), "a variable that it does read is found in {program}");
        assert!(!says(b"MIG_FAULT") && !says(b"source.committing"), "{program} has fault points");
    }
}
