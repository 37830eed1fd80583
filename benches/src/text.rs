//! Words and tables of the report.

use std::fmt::Write;

/// A table in Markdown.
#[derive(Debug)]
pub struct Table {
    columns: usize,
    text: String,
}

impl Table {
    /// An empty one with these columns.
    pub fn new(columns: &[&str]) -> Self {
        let text = format!("| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
        Self { columns: columns.len(), text }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// When it has not a cell for each column.
    pub fn row(&mut self, cells: &[String]) {
        assert_eq!(cells.len(), self.columns, "a cell for each column: {cells:?}");
        let _ = writeln!(self.text, "| {} |", cells.join(" | "));
    }

    /// The table, with an empty line behind it.
    pub fn finish(self) -> String {
        self.text + "\n"
    }
}

/// `met` or `missed`, or a dash where there is nothing to judge.
pub fn verdict(met: Option<bool>) -> String {
    match met {
        None => "-",
        Some(true) => "met",
        Some(false) => "**missed**",
    }
    .into()
}

/// `4 GiB`, `512 MiB`.
pub fn size(bytes: u64) -> String {
    if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) {
        format!("{} GiB", bytes >> 30)
    } else {
        format!("{} MiB", bytes >> 20)
    }
}

/// GiB, as a factor.
pub const GIB: f64 = (1u64 << 30) as f64;
/// MiB, as a factor.
pub const MIB: f64 = (1u64 << 20) as f64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_head_a_rule_and_its_rows() {
        let mut table = Table::new(&["a", "b"]);
        table.row(&["1".into(), verdict(Some(false))]);
        assert_eq!(table.finish(), "| a | b |\n|---|---|\n| 1 | **missed** |\n\n");
    }

    #[test]
    fn sizes_are_whole() {
        assert_eq!([size(4 << 30), size(1536 << 20)], ["4 GiB", "1536 MiB"]);
    }
}
