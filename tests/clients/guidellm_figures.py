"""The figures of a guidellm report as one JSON line with vLLM's names."""

import json
import sys

benchmark = json.load(open(sys.argv[1]))["benchmarks"][0]
metrics = benchmark["metrics"]


def of(name, what):
    found = metrics[name]["successful"]
    return found["mean"] if what == "mean" else found["percentiles"].get(what, found.get(what))


print(json.dumps({
    "completed": metrics["request_totals"]["successful"],
    "output_throughput": of("output_tokens_per_second", "mean"),
    "median_ttft_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
    "p95_ttft_ms": of("time_to_first_token_ms", "p95"),
    "median_tpot_ms": metrics["inter_token_latency_ms"]["successful"]["median"],
    "p95_tpot_ms": of("inter_token_latency_ms", "p95"),
}))
