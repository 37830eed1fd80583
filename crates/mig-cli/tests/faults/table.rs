//! The tables of `docs/faults.md`, which are what a run found: a test compares its own with the page, or with
//! `MIG_BLESS=1` puts it there.

use std::path::PathBuf;
use std::sync::Mutex;

static PAGE: Mutex<()> = Mutex::new(());

/// Compares the rows with the table of that name on the page, and prints them.
pub fn assert_as_written(name: &str, columns: &[&str], rows: &[Vec<String>]) {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let columns: Vec<String> = columns.iter().map(|c| (*c).to_owned()).collect();
    let mut table = line(&columns) + &line(&vec!["---".to_owned(); columns.len()]);
    rows.iter().for_each(|row| table += &line(row));
    println!("{table}");
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/faults.md"));
    let _one_at_a_time = PAGE.lock().unwrap();
    let page = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = (format!("<!-- {name} -->\n\n"), format!("\n<!-- end of {name} -->\n"));
    let (before, rest) = page.split_once(&begin).expect("the page has the table's beginning");
    let (written, after) = rest.split_once(&end).expect("the page has the table's end");
    if std::env::var_os("MIG_BLESS").is_some() {
        return std::fs::write(&path, [before, &begin, &table, &end, after].concat()).unwrap();
    }
    for (found, written) in table.lines().zip(written.lines()) {
        assert_eq!(found, written, "found, and written in docs/faults.md (MIG_BLESS=1 writes what is found)");
    }
    assert_eq!(table, written);
}
