# Thin recipes over cargo.

# Shows one live migration on this machine
demo:
    cargo run --release --bin mig-send -- --demo

# All tests, as the README gives them
test:
    cargo test --workspace

# What CI runs
ci:
    .ci/run

# Formatting, lints, documentation
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# The benchmarks
bench:
    cargo bench -p mig-benches
