//! Where the guest's serial output goes.

use std::io::{self, Write};

/// A sink for the guest's text.
pub struct Console {
    sink: Box<dyn Write + Send>,
}

impl Console {
    /// Nowhere.
    pub fn none() -> Self {
        Self::to(io::sink())
    }

    /// Standard output.
    pub fn stdout() -> Self {
        Self::to(io::stdout())
    }

    /// Anything that can be written to. A write that blocks holds up the vCPU that caused it, and a pause too.
    pub fn to(sink: impl Write + Send + 'static) -> Self {
        Self { sink: Box::new(sink) }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}
