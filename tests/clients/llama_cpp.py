"""Tokens a second of `kvfuse serve` and of llama.cpp's server on one GGUF file, in turns on one machine, as JSON lines.

    pip install xllamacpp
    python tests/clients/llama_cpp.py KVFUSE MODEL.gguf [ROUNDS] [THREADS]

Decode: so many requests at once, each with its own prompt of about 256 tokens, counted while all of them decode. Prefill: one prompt of about 512 tokens,
up to the first token of its answer. The last lines hold medians over the rounds and their ratios.
"""

import asyncio
import json
import multiprocessing
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

SEQUENCES = (1, 8, 32, 64)
TOKENS = 160
WORDS = "the of and to in is was that for on with by he at from his it an were are which this be had not has first also after two they their who".split()


def prompt(words, seed):
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(words))


def served_model(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        return json.load(answer)["data"][0]["id"]


async def stream(server, text, tokens):
    """Seconds at which each token came."""
    port, model = server
    asked = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    came = []
    while line := await reader.readline():
        if line.startswith(b"data: {") and b'"text"' in line:
            came.append(time.perf_counter())
    writer.close()
    assert len(came) >= tokens - 2, f"{len(came)} of {tokens} tokens came"
    return came


async def decode(server, sequences, seed):
    texts = [prompt(256, seed + i) for i in range(sequences)]
    came = await asyncio.gather(*(stream(server, text, TOKENS) for text in texts))
    start, end = max(own[0] for own in came), min(own[-1] for own in came)
    assert end > start, "never did all decode at once; ask for more tokens"
    return sum(start < at <= end for own in came for at in own) / (end - start)


async def prefill(server, seed):
    started = time.perf_counter()
    # Their first tokens say when the prompt was done; one is not enough for servers that hold it back until they know the next.
    came = await stream(server, prompt(512, seed), 4)
    return 512 / (came[0] - started)


def serve_llama(model, threads, port, ready):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = max(SEQUENCES)
    params.n_ctx = max(SEQUENCES) * 768
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port = port
    params.n_gpu_layers = 0
    params.warmup = True
    params.verbosity = -1
    server = xllamacpp.Server(params)
    ready.put(server.listening_address)
    time.sleep(1e9)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port):
    """Until a server is up and has loaded its model."""
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"no server at port {port}")


def main(kvfuse, model, rounds=2, threads=2):
    rounds, threads = int(rounds), int(threads)
    ports = {"llama.cpp": free_port(), "kvfuse": free_port()}
    ready = multiprocessing.Queue()
    llama = multiprocessing.Process(target=serve_llama, args=(model, threads, ports["llama.cpp"], ready), daemon=True)
    llama.start()
    print(json.dumps({"llama.cpp": ready.get(timeout=120)}), flush=True)
    own = [kvfuse, "-q", "serve", "--model", model, "--method", "none", "--kv-cache-memory-bytes", "2GiB", "--threads", str(threads), "--port", str(ports["kvfuse"])]
    served = subprocess.Popen(own, stdout=subprocess.DEVNULL)
    try:
        for port in ports.values():
            wait_for(port)
        servers = {side: (port, served_model(port)) for side, port in ports.items()}
        rates = {}
        for n in range(rounds):
            for what in ("prefill", *SEQUENCES):
                for side in ports if n % 2 == 0 else reversed(ports):
                    seed = 1000 * n + 7
                    run = prefill(servers[side], seed) if what == "prefill" else decode(servers[side], what, seed)
                    rate = asyncio.run(run)
                    rates.setdefault((what, side), []).append(rate)
                    print(json.dumps({"what": what, "side": side, "tokens_per_second": round(rate, 1)}), flush=True)
        for what in ("prefill", *SEQUENCES):
            sides = {side: statistics.median(rates[what, side]) for side in ports}
            rounded = {side: round(rate, 1) for side, rate in sides.items()}
            print(json.dumps({"what": what, **rounded, "kvfuse / llama.cpp": round(sides["kvfuse"] / sides["llama.cpp"], 2)}))
    finally:
        served.terminate()
        llama.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
