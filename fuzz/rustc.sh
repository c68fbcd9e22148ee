#!/bin/sh
# Compiles with counters for the fuzzer: cargo calls it for the packages of this workspace alone, so dependencies are not built again.
exec "$@" --cfg fuzzing -C debug-assertions -C passes=sancov-module \
    -C llvm-args=-sanitizer-coverage-level=4 -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
    -C llvm-args=-sanitizer-coverage-pc-table -C llvm-args=-sanitizer-coverage-trace-compares
