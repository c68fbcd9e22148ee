#!/bin/sh
# Public clients against `kvfuse serve` on loopback, and serve-bench on the same prompts beside them: the openai package and guidellm, 200 streaming
# requests each, then three times the load that the server can take. Usage: tests/clients/run.sh PYTHON [KVFUSE] (openai and guidellm installed)
set -eu
python=$1
kvfuse=$(realpath "${2:-target/release/kvfuse}")
here=$(realpath "$(dirname "$0")")
work=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"
port=8731
url=http://127.0.0.1:$port
budget=128MiB
tokens=32
at_once=8

"$kvfuse" -q dump --data builtin:qa --limit 200 -o qa > /dev/null
"$python" -c '
import json
for request in json.load(open("qa/manifest.json"))["requests"]:
    print(json.dumps({"prompt": request["prompt"], "answers": ["x"], "output_tokens_count": 32, "prompt_tokens_count": request["tokens"]}))
' > prompts.jsonl
echo "== serve-bench"
"$kvfuse" -q serve-bench --data prompts:prompts.jsonl --requests 200 --method prefix --kv-cache-memory-bytes $budget --output-len $tokens --ignore-eos \
    --max-concurrency $at_once --quality-requests 0 -o bench > /dev/null
"$python" - <<'PY'
import csv, json
row = [r for r in csv.DictReader(open("bench/serve.csv")) if r["method"] == "prefix"][0]
print(json.dumps({k: float(row[k]) for k in ("completed", "duration", "total_output_tokens", "output_throughput", "median_ttft_ms", "p95_ttft_ms", "median_tpot_ms", "p95_tpot_ms") if row.get(k)}))
PY
start() {
    "$kvfuse" -q serve --method prefix --kv-cache-memory-bytes $budget --port $port > served.log 2>&1 & server=$!
    for i in $(seq 60); do curl -sf $url/health > /dev/null && break; sleep 1; done
}
stop() { kill -INT $server; wait $server; echo "server ended with $?"; }

echo "== openai"
start
"$python" "$here/stream.py" $url/v1 prompts.jsonl $at_once $tokens 200
stop

echo "== guidellm"
start
HF_HUB_OFFLINE=1 "$python" -m guidellm benchmark run --target $url --profile concurrent --rate $at_once --max-requests 200 --data prompts.jsonl \
    --request-format /v1/completions --backend-kwargs '{"validate_backend": false}' --processor gpt2 --output-path guidellm.json > guidellm.log 2>&1 || tail -20 guidellm.log
"$python" "$here/guidellm_figures.py" guidellm.json || true
stop

echo "== overload: three times as many as it can take, a third of them hang up"
start
"$python" "$here/overload.py" $url/v1 prompts.jsonl
curl -s $url/metrics | grep -E '^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|gpu_cache_usage_perc)' || true
stop
