"""200 streaming completions by the openai package against `kvfuse serve`, as one JSON line with vLLM's names.

    pip install openai
    python tests/clients/stream.py http://127.0.0.1:8000/v1 PROMPTS.jsonl [CONCURRENCY] [TOKENS] [REQUESTS]

Every request asks for exactly so many tokens (ignore_eos), as `kvfuse serve-bench --output-len TOKENS --ignore-eos --max-concurrency CONCURRENCY` does.
"""

import asyncio
import json
import sys
import time

from openai import AsyncOpenAI


async def one(client, model, prompt, tokens, turn, seen):
    async with turn:
        started = time.perf_counter()
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True})
        first, usage = None, None
        async for chunk in stream:
            if chunk.choices and first is None:
                first = time.perf_counter()
            usage = chunk.usage or usage
        ended = time.perf_counter()
        seen.append((first - started, (ended - first) / max(usage.completion_tokens - 1, 1), usage.completion_tokens, usage.prompt_tokens))


async def main(url, file, concurrency=8, tokens=32, requests=200):
    prompts = [json.loads(line)["prompt"] for line in open(file)]
    client = AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
    model = (await client.models.list()).data[0].id
    turn, seen = asyncio.Semaphore(int(concurrency)), []
    started = time.perf_counter()
    await asyncio.gather(*(one(client, model, prompts[i % len(prompts)], int(tokens), turn, seen) for i in range(int(requests))))
    seconds = time.perf_counter() - started

    def quantile(x, q):
        x = sorted(x)
        return x[min(int(len(x) * q), len(x) - 1)]

    ttft, tpot, output, _ = zip(*seen)
    print(json.dumps({
        "completed": len(seen), "duration": seconds, "total_output_tokens": sum(output), "output_throughput": sum(output) / seconds,
        "median_ttft_ms": 1e3 * quantile(ttft, 0.5), "p95_ttft_ms": 1e3 * quantile(ttft, 0.95),
        "median_tpot_ms": 1e3 * quantile(tpot, 0.5), "p95_tpot_ms": 1e3 * quantile(tpot, 0.95)}))


asyncio.run(main(*sys.argv[1:]))
