"""Asks for far more than the server can take at once, with some clients that hang up, a prompt longer than the budget and nonsense in between: every
request is answered or refused in a way that says why, and the server serves on.

    python tests/clients/overload.py http://127.0.0.1:8000/v1 PROMPTS.jsonl [REQUESTS] [AT_ONCE]
"""

import asyncio
import collections
import json
import random
import sys

from openai import APIStatusError, AsyncOpenAI


async def one(client, model, prompt, hang_up):
    try:
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=32, temperature=0, stream=True, extra_body={"ignore_eos": True})
        seen = 0
        async for chunk in stream:
            seen += bool(chunk.choices)
            if hang_up and seen == 3:
                await stream.close()
                return "hung up"
        return "served"
    except APIStatusError as error:
        return f"refused with {error.status_code}: {error.message[:60]}"


async def main(url, file, requests=300, at_once=150):
    prompts = [json.loads(line)["prompt"] for line in open(file)]
    client = AsyncOpenAI(base_url=url, api_key="none", timeout=900, max_retries=0)
    model = (await client.models.list()).data[0].id
    rng, turn = random.Random(3), asyncio.Semaphore(int(at_once))

    async def turned(i):
        async with turn:
            prompt = "long " * 7900 if i % 50 == 7 else prompts[i % len(prompts)]
            return await one(client, model, prompt, rng.random() < 1 / 3)

    said = collections.Counter(await asyncio.gather(*(turned(i) for i in range(int(requests)))))
    print(json.dumps(said, indent=1))
    assert said["served"] > 0 and sum(said.values()) == int(requests)
    # It serves on.
    assert await one(client, model, prompts[0], False) == "served"


asyncio.run(main(*sys.argv[1:]))
