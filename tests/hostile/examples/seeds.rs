//! Writes the seeds into a folder, a file each: where libFuzzer starts from.

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).expect("usage: seeds FOLDER");
    let folder = std::path::Path::new(&folder);
    std::fs::create_dir_all(folder)?;
    for seed in mig_hostile::seeds::all() {
        std::fs::write(folder.join(seed.name.replace([' ', ':'], "-")), seed.bytes)?;
    }
    Ok(())
}
