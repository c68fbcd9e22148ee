#!/bin/sh
# Fuzzes every target for MINUTES, two at a time; what ends a target is left in fuzz/found and named. Usage: fuzz/run.sh [MINUTES] [TARGET...]
# libFuzzer (the crate libfuzzer-sys) on stable Rust: the workspace's own packages are compiled with its counters (fuzz/rustc.sh).
set -eu
cd "$(dirname "$0")"
minutes=${1:-2}
[ $# -gt 0 ] && shift
targets=${*:-gguf config safetensors tokenizer manifest shard encoded joint spec experiment table squad longbench ruler prompts}
RUSTC_WORKSPACE_WRAPPER="$PWD/rustc.sh" cargo build --release -p kvfuse-fuzz
one() {
    mkdir -p "../target/fuzz/$1" found
    KVFUSE_FUZZ=$1 ../target/release/kvfuse-fuzz "../target/fuzz/$1" "seeds/$1" -max_total_time=$((minutes * 60)) -rss_limit_mb=1024 -timeout=10 -max_len=65536 \
        -artifact_prefix="found/$1-" -print_final_stats=1 > "../target/fuzz/$1.log" 2>&1 || echo "$1: ended early, see fuzz/found and target/fuzz/$1.log"
    rm -rf /dev/shm/kvfuse-fuzz-"$1"-*
    echo "$1: $(grep -o 'number_of_executed_units: [0-9]*' "../target/fuzz/$1.log" | grep -o '[0-9]*$') inputs, peak $(grep -o 'peak_rss_mb: *[0-9]*' "../target/fuzz/$1.log" | grep -o '[0-9]*$') MB"
}
running=0
for target in $targets; do
    one "$target" &
    running=$((running + 1))
    if [ $running -ge 2 ]; then
        wait
        running=0
    fi
done
wait
