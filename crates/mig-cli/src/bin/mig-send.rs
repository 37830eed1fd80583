//! Runs a guest and moves it; see `mig-send --help`.

fn main() -> std::process::ExitCode {
    mig_cli::main("mig-send", mig_cli::send::run)
}
