//! Files that are written, renamed and read again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::duty::Check;
use crate::random::{Random, checksum};
use crate::report::{Count, Fault, Report};

const FILES: usize = 8;
const WORDS: usize = 1024;

/// Files in a directory of their own, which is removed at the end.
pub(crate) struct Files {
    directory: PathBuf,
    /// What is in each; none if it was not written yet.
    sums: [Option<u64>; FILES],
    random: Random,
}

impl Files {
    /// # Errors
    /// The directory cannot be made.
    pub(crate) fn start(parent: &Path) -> io::Result<Self> {
        let directory = parent.join(format!("watch-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        Ok(Self { directory, sums: [None; FILES], random: Random::new(1) })
    }

    fn path(&self, file: usize) -> PathBuf {
        self.directory.join(format!("file-{file}"))
    }

    /// A new one in the place of an old one.
    fn write(&mut self, file: usize) -> io::Result<()> {
        let words: Vec<u64> = (0..WORDS).map(|_| self.random.next()).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let new = self.directory.join("new");
        fs::write(&new, bytes)?;
        fs::rename(&new, self.path(file))?;
        self.sums[file] = Some(checksum(&words));
        Ok(())
    }

    fn read(&self, file: usize) -> Result<(), Fault> {
        let Some(sum) = self.sums[file] else { return Ok(()) };
        let bytes = fs::read(self.path(file)).map_err(|e| Fault::new("reading a file", "success", e))?;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight"))).collect();
        if bytes.len() == WORDS * 8 && checksum(&words) == sum {
            return Ok(());
        }
        let expected = format!("{} bytes with checksum {sum:#x} in file {file}", WORDS * 8);
        Err(Fault::new("file", expected, format!("{} bytes with {:#x}", bytes.len(), checksum(&words))))
    }
}

impl Check for Files {
    const NAME: &'static str = "files";
    const PERIOD: Duration = Duration::from_millis(1000);

    fn step(&mut self, report: &Report) -> Result<(), Fault> {
        let (old, new) = (self.random.below(FILES), self.random.below(FILES));
        let read = self.read(old);
        self.write(new).map_err(|e| Fault::new("writing a file", "success", e))?;
        report.checked(Count::Files, 2);
        read.and(self.read(new))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // What is left is in a temporary directory.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_short_and_lost_files_are_found_and_the_directory_removed() {
        let parent = tempfile::tempdir().unwrap();
        let mut files = Files::start(parent.path()).unwrap();
        let report = Report::new(Duration::from_secs(5));
        for _ in 0..50 {
            files.step(&report).unwrap();
        }
        let right = fs::read(files.path(2)).unwrap();
        let mut changed = right.clone();
        changed[4000] ^= 1;
        for wrong in [&changed[..], &right[..8184], &[]] {
            fs::write(files.path(2), wrong).unwrap();
            assert_eq!(files.read(2).unwrap_err().what, "file");
        }
        fs::rename(files.path(3), files.path(2)).unwrap();
        assert!(files.read(2).is_err() && files.read(3).unwrap_err().what == "reading a file");
        drop(files);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
