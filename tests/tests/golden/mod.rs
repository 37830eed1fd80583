//! Golden files: bytes as a version of the protocol wrote them, kept for ever.
//!
//! `golden/vN/` belongs to version N of the protocol and never changes: every later program still reads it. A
//! new version is a new directory. `MIG_BLESS=1 cargo test -p mig-tests` writes the files of the current
//! version that do not exist; it never overwrites one, so whoever must replace a file deletes it first.

use std::path::PathBuf;

/// The version that today's programs write.
pub(crate) const CURRENT: &str = "v1";

/// A golden file.
pub(crate) fn path(version: &str, name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(version).join(name)
}

/// The bytes of a golden file.
pub(crate) fn read(version: &str, name: &str) -> Vec<u8> {
    let path = path(version, name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e} (see tests/golden/README.md)", path.display()))
}

/// Writes a file of the current version if that was asked for and the file does not exist.
pub(crate) fn bless(name: &str, content: impl FnOnce() -> Vec<u8>) {
    let path = path(CURRENT, name);
    if std::env::var_os("MIG_BLESS").is_some_and(|v| v == "1") && !path.exists() {
        std::fs::create_dir_all(path.parent().expect("in a directory")).expect("the directory can be made");
        std::fs::write(&path, content()).expect("the file can be written");
    }
}
