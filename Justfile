# `just` alone lists what can be done.

default:
    @just --list

# All of it with defaults: model, dump, sweep, figures into results/demo
demo:
    cargo run --release -- demo

# Format check, lints, docs, tests: what CI runs
ci:
    .ci/run

test:
    cargo test --release

# GEMM, prefill, batched decode and fusion on this machine
bench:
    cargo bench

# The figures of results/bff-qa: BFF on the built-in questions
fig-bff-qa:
    cargo run --release -- dump --requests 64 --shots 3 --dtype f16 -o dumps/qa
    cargo run --release -- sweep --config experiments/bff-qa.toml
    cargo run --release -- plot results/bff-qa

# BFF on a SQuAD v1.1 file: just squad ../shared/data/xquad-en-a.json
squad FILE:
    cargo run --release -- dump --data squad:{{FILE}} --requests 64 --shots 3 -o dumps/squad
    cargo run --release -- sweep dumps/squad -o dumps/squad/sweep
    cargo run --release -- plot dumps/squad/sweep
