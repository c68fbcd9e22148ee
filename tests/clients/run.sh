#!/bin/sh
# Public clients against `kvfuse serve` on loopback, and serve-bench on the same prompts beside them: the openai package and guidellm, 200 streaming
# requests each, then three times the load that the server can take. Usage: tests/clients/run.sh PYTHON [KVFUSE [PROMPTS]] (openai and guidellm installed)
set -eu
python=$1
kvfuse=$(realpath "${2:-target/release/kvfuse}")
prompts=$([ -n "${3:-}" ] && realpath "$3" || true)
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

# 200 few-shot prompts of the built-in data (which has 196: four come twice); a file of them may be given instead.
if [ -n "$prompts" ]; then
    cp "$prompts" prompts.jsonl
else
    "$kvfuse" -q dump --data builtin:qa --limit 200 -o qa > /dev/null
    "$python" -c '
import json
all = json.load(open("qa/manifest.json"))["requests"]
for request in (all + all)[:200]:
    print(json.dumps({"prompt": request["prompt"], "answers": ["x"], "output_tokens_count": 32, "prompt_tokens_count": request["tokens"]}))
' > prompts.jsonl
fi
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
HF_HUB_OFFLINE=1 "$python" -m guidellm run --backend kind=openai_http,target=$url,request_format=/v1/completions --profile kind=concurrent,streams=$at_once \
    --constraint kind=max_requests,count=200 --data kind=json_file,path=prompts.jsonl --output kind=json,path=guidellm.json --disable-console > guidellm.log 2>&1 || tail -20 guidellm.log
"$python" "$here/guidellm_figures.py" guidellm.json
stop

echo "== overload: three times as many as it can take, a third of them hang up"
start
"$python" "$here/overload.py" $url/v1 prompts.jsonl
curl -s $url/metrics | grep -E '^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|gpu_cache_usage_perc)' || true
stop
