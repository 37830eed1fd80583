//! The control socket of whoever holds a guest: a line of JSON there, a line back.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Asks once.
pub(crate) fn ask(socket: &Path, request: &Value) -> Result<Value> {
    let answer = || -> Result<Value> {
        let mut stream = UnixStream::connect(socket)?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    answer().with_context(|| socket.display().to_string())
}
