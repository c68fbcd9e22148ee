# `just` alone lists what can be done.

# A SQuAD v1.1 file for the figures on real questions: just xquad=FILE figures (--quick needs none)
xquad := "../shared/data/xquad-en-a.json"
kvfuse := "cargo run --release --"
experiment := kvfuse + " run --define xquad=" + xquad

default:
    @just --list --unsorted

# All of it with defaults: model, dump, sweep, figures into results/demo
demo:
    {{kvfuse}} demo

# All tests, on the real models
test:
    cargo test --release

# Formatting, lints, docs, tests: what CI runs
ci:
    .ci/run

# FMA peak, GEMM, similarities, prefill, batched decode and fusion on this machine
bench:
    cargo bench

# Peak memory of loading a bf16 folder of 1 GiB, which is written for it
memory:
    cargo test --release --test architectures -- --ignored --nocapture

# Fuzzes everything that is read, MINUTES a target, two at a time (docs/reliability.md)
fuzz MINUTES="2":
    fuzz/run.sh {{MINUTES}}

# Kills the binary KILLS times at random moments and compares what comes out (docs/reliability.md)
kills KILLS="200":
    cargo build --release
    python3 tests/reliability/kills.py {{KILLS}}

# Peak memory with a model of the shape of Llama-3-8B, which is written for it: just big PYTHON, with the packages gguf and numpy (10 minutes)
big PYTHON KIND="Q4_0":
    cargo build --release
    {{PYTHON}} tests/reliability/big_model.py target/release/kvfuse ~/.cache/kvfuse/models/smollm2-135m.gguf target/big {{KIND}}

# A sweep in four shards on a real Slurm on this machine (needs root and Debian's packages)
slurm:
    cargo build --release
    tests/cluster/slurm.sh

# Public clients against `kvfuse serve`: just clients PYTHON, with the packages openai and guidellm
clients PYTHON:
    cargo build --release
    tests/clients/run.sh {{PYTHON}}

# Tokens a second beside llama.cpp's server on the same file, in turns: just llama-cpp PYTHON MODEL.gguf, with the package xllamacpp
llama-cpp PYTHON MODEL:
    cargo build --release
    {{PYTHON}} tests/clients/llama_cpp.py target/release/kvfuse {{MODEL}}

# Every figure of results/, with all its models (about three hours on 2 cores; `just figures --quick`: five minutes)
figures *FLAGS:
    {{experiment}} {{FLAGS}} experiments/*.toml

# Makes the small figures again and holds their tables against results/quick
check:
    rm -rf target/check
    {{kvfuse}} run --quick --root target/check experiments/*.toml
    {{kvfuse}} check results/quick target/check/quick

# One HTML file of all results
report:
    {{kvfuse}} report results

# The paper's method with its own settings, on the built-in questions
fig-bff-qa *FLAGS:
    {{experiment}} {{FLAGS}} experiments/bff-qa.toml

# F1 with and without fusion on 240 questions
fig-accuracy *FLAGS:
    {{experiment}} {{FLAGS}} experiments/accuracy.toml

# What comes on top of exact prefix sharing: fusion, quantisation, and both
fig-chains *FLAGS:
    {{experiment}} {{FLAGS}} experiments/chains.toml

# The joint codec on few-shot prompts: its curve, and what each of its parts is worth
fig-joint *FLAGS:
    {{experiment}} {{FLAGS}} experiments/joint.toml

# The joint codec on two other models
fig-joint-models *FLAGS:
    {{experiment}} {{FLAGS}} experiments/joint-models.toml

# F1 of the joint codec on 240 questions
fig-joint-accuracy *FLAGS:
    {{experiment}} {{FLAGS}} experiments/joint-accuracy.toml

# Retrieval-augmented prompts: fusion, quantisation, the joint codec
fig-rag *FLAGS:
    {{experiment}} {{FLAGS}} experiments/rag.toml

# Every method on one plane: few-shot questions, retrieval-augmented prompts, long documents (an hour to an hour and a half; --quick: four minutes)
rd-plane *FLAGS:
    {{experiment}} {{FLAGS}} experiments/rd-few-shot.toml experiments/rd-rag.toml experiments/rd-long.toml

# Every method on few-shot questions
fig-rd-few-shot *FLAGS:
    {{experiment}} {{FLAGS}} experiments/rd-few-shot.toml

# Every method on retrieval-augmented prompts
fig-rd-rag *FLAGS:
    {{experiment}} {{FLAGS}} experiments/rd-rag.toml

# Every method on needles in long documents
fig-rd-long *FLAGS:
    {{experiment}} {{FLAGS}} experiments/rd-long.toml

# Serving under budgets that hold four to sixteen uncompressed requests, at loads, retrieval-augmented prompts and conversations; what moving a cache takes (an hour and a half)
fig-serve:
    {{kvfuse}} dump --data squad:{{xquad}} --half first --requests 120 --shots 3 --dtype f16 -o dumps/serve-training
    {{kvfuse}} train dumps/serve-training -o dumps/codecs/serve.safetensors
    {{kvfuse}} serve-bench --data squad:{{xquad}} --half second --requests 40 --output-len 64 --ignore-eos --method 'none,prefix,prefix+bff:tau=0.9,prefix+kivi:bits=4,prefix+joint:codec=dumps/codecs/serve.safetensors,step=0.006,reference=false' --budget-requests 8,4,16 --repeats 2 -o results/serve-few-shot
    {{kvfuse}} plot results/serve-few-shot
    {{kvfuse}} project results/serve-few-shot
    {{kvfuse}} serve-bench --data squad:{{xquad}} --half second --requests 32 --output-len 64 --ignore-eos --method none,prefix,prefix+bff:tau=0.9,prefix+kivi:bits=4 --request-rate 1,0.5,2 --goodput ttft:5000 tpot:250 --repeats 1 -o results/serve-load
    {{kvfuse}} plot results/serve-load
    {{kvfuse}} serve-bench --data squad:{{xquad}} --half second --requests 20 --passages 4 --pool 16 --output-len 48 --ignore-eos --method 'none,prefix,prefix+bff:tau=0.9,prefix+kivi:bits=4,prefix+joint:codec=dumps/codecs/serve.safetensors,step=0.006,reference=false' --request-rate 1 --goodput ttft:5000 tpot:500 --repeats 1 -o results/serve-rag
    {{kvfuse}} plot results/serve-rag
    {{kvfuse}} serve-bench --data squad:{{xquad}} --half second --turns 4 --requests 96 --output-len 16 --ignore-eos --method 'none,prefix,prefix+bff:tau=0.9,prefix+kivi:bits=4,prefix+joint:codec=dumps/codecs/serve.safetensors,step=0.006,reference=false,prefix+kivi:bits=4+joint:codec=dumps/codecs/serve.safetensors,step=0.006,reference=false' --budget-requests 4,8 --max-concurrency 4 --repeats 1 -o results/serve-turns
    {{kvfuse}} plot results/serve-turns
    {{kvfuse}} dump --data squad:{{xquad}} --half second --requests 8 --shots 3 --dtype f16 -o dumps/migration
    {{kvfuse}} migrate dumps/migration --method 'none,int8,kivi:bits=4|2,joint:codec=dumps/codecs/serve.safetensors,step=0.006' -o results/migration
    {{kvfuse}} plot results/migration

# KL by the place of a token in 256 after the prompt
fig-rd-generation *FLAGS:
    {{experiment}} {{FLAGS}} experiments/rd-generation.toml

# How many requests are fused together, 8 to 64
fig-batch *FLAGS:
    {{experiment}} {{FLAGS}} experiments/batch.toml

# Tokens a block, 4 to 64
fig-block-size *FLAGS:
    {{experiment}} {{FLAGS}} experiments/block-size.toml

# Which blocks fuse with which
fig-pairings *FLAGS:
    {{experiment}} {{FLAGS}} experiments/pairings.toml

# What it costs to leave the first and last layers alone
fig-spare-layers *FLAGS:
    {{experiment}} {{FLAGS}} experiments/spare-layers.toml

# What a cluster should store
fig-representatives *FLAGS:
    {{experiment}} {{FLAGS}} experiments/representatives.toml

# What should be compared
fig-similarities *FLAGS:
    {{experiment}} {{FLAGS}} experiments/similarities.toml

# An error budget instead of a threshold
fig-max-error *FLAGS:
    {{experiment}} {{FLAGS}} experiments/max-error.toml

# What it costs to fuse within tenants only
fig-tenants *FLAGS:
    {{experiment}} {{FLAGS}} experiments/tenants.toml

# Equal text at other positions, RoPE kept or stripped
fig-shift *FLAGS:
    {{experiment}} {{FLAGS}} experiments/shift.toml

# Equal text at other positions and in other blocks
fig-shift-unaligned *FLAGS:
    {{experiment}} {{FLAGS}} experiments/shift-unaligned.toml

# Chunks fast-fusion on long prompts, two and four chunks
fig-cff *FLAGS:
    {{experiment}} {{FLAGS}} experiments/cff.toml

# How alike blocks are, and the Poisson model's predictions against a sweep
fig-poisson *FLAGS:
    {{experiment}} {{FLAGS}} experiments/poisson.toml

# Thresholds of single layers against one for all, on unseen questions
fig-calibrated *FLAGS:
    {{experiment}} {{FLAGS}} experiments/calibrated.toml

# Thresholds from statistics alone (fig-calibrated comes first)
fig-model-based *FLAGS:
    {{experiment}} {{FLAGS}} experiments/model-based.toml

# BFF on a SQuAD v1.1 file: just squad ../shared/data/xquad-en-a.json
squad FILE:
    {{kvfuse}} dump --data squad:{{FILE}} --requests 64 --shots 3 -o dumps/squad
    {{kvfuse}} sweep dumps/squad -o dumps/squad/sweep
    {{kvfuse}} plot dumps/squad/sweep
