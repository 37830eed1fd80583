//! Receives a running guest and runs it; see `mig-recv --help`.

fn main() -> std::process::ExitCode {
    mig_cli::main("mig-recv", mig_cli::recv::run)
}
