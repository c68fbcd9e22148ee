# `just` alone lists what can be done.

# A SQuAD v1.1 file for the figures on real questions: just xquad=FILE fig-pairings
xquad := "../shared/data/xquad-en-a.json"
kvfuse := "cargo run --release --"

default:
    @just --list

# All of it with defaults: model, dump, sweep, figures into results/demo
demo:
    {{kvfuse}} demo

# Format check, lints, docs, tests: what CI runs
ci:
    .ci/run

test:
    cargo test --release

# FMA peak, GEMM, similarities, prefill, batched decode and fusion on this machine
bench:
    cargo bench

# The figures of results/bff-qa: BFF on the built-in questions
fig-bff-qa:
    {{kvfuse}} dump --requests 64 --shots 3 --dtype f16 -o dumps/qa
    {{kvfuse}} sweep --config experiments/bff-qa.toml
    {{kvfuse}} plot results/bff-qa

# All figures on real questions and long prompts (about an hour on 2 cores)
figs: fig-pairings fig-spare-layers fig-representatives fig-similarities fig-max-error fig-calibrated fig-tenants fig-shift fig-shift-unaligned fig-cff fig-poisson fig-model-based

# Which pairing stores least at the same damage
fig-pairings: dump-xquad (fig "pairings")

# What it costs to leave the first and last layers alone
fig-spare-layers: dump-xquad (fig "spare-layers")

# What a cluster should store
fig-representatives: dump-xquad (fig "representatives")

# What should be compared
fig-similarities: dump-xquad (fig "similarities")

# An error budget instead of a threshold
fig-max-error: dump-xquad (fig "max-error")

# What it costs to fuse within tenants only
fig-tenants: dump-xquad (fig "tenants")

# Thresholds of single layers against one for all, on unseen questions
fig-calibrated:
    {{kvfuse}} dump --data squad:{{xquad}} --requests 128 --shots 3 --dtype f16 -o dumps/xquad-128
    {{kvfuse}} calibrate dumps/xquad-128 --target-kl 0.005,0.02,0.05,0.2 -o results/calibrated/xquad.toml
    {{just_executable()}} xquad={{xquad}} fig calibrated

# Equal text at other positions
fig-shift:
    {{kvfuse}} dump --data squad:{{xquad}} --requests 64 --shots 3 --shift 64 --dtype f16 -o dumps/xquad-shift
    {{just_executable()}} xquad={{xquad}} fig shift

# Equal text at other positions and in other blocks
fig-shift-unaligned:
    {{kvfuse}} dump --data squad:{{xquad}} --requests 64 --shots 3 --shift 61 --dtype f16 -o dumps/xquad-shift-61
    {{just_executable()}} xquad={{xquad}} fig shift-unaligned

# Chunks fast-fusion on long prompts
fig-cff:
    {{kvfuse}} dump --data builtin:longqa --requests 16 --shots 3 --dtype f16 -o dumps/longqa
    {{just_executable()}} fig cff

# Similarity statistics, and the Poisson model's predictions against a sweep
fig-poisson: dump-xquad (fig "poisson")
    {{kvfuse}} stats dumps/xquad -o results/poisson
    {{kvfuse}} simulate --stats results/poisson/stats.csv --against results/poisson/sweep.csv --requests 8..65536 -o results/poisson

# Thresholds from the model against measured ones (fig-calibrated comes first)
fig-model-based:
    {{kvfuse}} dump --data squad:{{xquad}} --requests 128 --shots 3 --dtype f16 -o dumps/xquad-128
    {{kvfuse}} calibrate dumps/xquad-128 --model-based --target-cr 3.5,4.2,4.8,6.5 -o results/model-based/xquad.toml
    {{just_executable()}} xquad={{xquad}} fig model-based

# Sweep and plot what experiments/NAME.toml says
fig NAME:
    {{kvfuse}} sweep --config experiments/{{NAME}}.toml
    {{kvfuse}} plot results/{{NAME}}

dump-xquad:
    {{kvfuse}} dump --data squad:{{xquad}} --requests 64 --shots 3 --tenants 4 --dtype f16 -o dumps/xquad

# BFF on a SQuAD v1.1 file: just squad ../shared/data/xquad-en-a.json
squad FILE:
    {{kvfuse}} dump --data squad:{{FILE}} --requests 64 --shots 3 -o dumps/squad
    {{kvfuse}} sweep dumps/squad -o dumps/squad/sweep
    {{kvfuse}} plot dumps/squad/sweep
