//! The debug-exit port: a byte written there ends the machine with that code.

pub(crate) const PORT: u16 = crate::workload::EXIT_PORT;
