# Thin recipes over cargo.

# Shows one live migration on this machine
demo:
    cargo run --release --bin mig-send -- --demo

# All tests, as the README gives them
test:
    cargo test --workspace

# A Linux guest moves while it works; builds it first, which takes minutes once
linux:
    MIG_LINUX=$(tests/guests/linux/build) MIG_STOCK_KERNEL=$(tests/guests/linux/stock)/vmlinux \
        cargo test --release -p mig-cli --test linux -- --nocapture --test-threads=1

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

# Measures live migrations on this machine and writes target/report/report.md
report *options:
    cargo run --release -p mig-benches --bin report -- {{options}}
