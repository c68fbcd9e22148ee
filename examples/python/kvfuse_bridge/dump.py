"""`kvfuse-bridge dump`: the KV caches of a transformers model, as a dump that kvfuse reads."""

import json
from pathlib import Path

from . import files, models


def prompts_of(args, tokenizer):
    """Manifest entries and token ids: of the prompts of another dump, or of JSON lines with `prompt` and `answers`."""
    if args.like:
        manifest = files.read_manifest(args.like)
        entries = [{k: v for k, v in r.items() if k not in ("bits", "sha256")} for r in manifest["requests"]]
        return entries, manifest.get("stop"), manifest["data"]
    entries = []
    for number, line in enumerate(Path(args.prompts).read_text().splitlines()):
        if line.strip():
            given = json.loads(line)
            entries.append({
                "id": given.get("id", f"prompt-{number}"),
                "question": given.get("question", ""),
                "references": given.get("answers", []),
                "prompt": given["prompt"],
                "contexts": [],
            })
    data = {"name": f"prompts:{args.prompts}", "sha256": "", "template": "", "shots": []}
    return entries, args.stop, data


def run(args):
    model, tokenizer = models.load(args.model, args.device)
    entries, stop, data = prompts_of(args, tokenizer)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [tokenizer(entry["prompt"])["input_ids"] for entry in entries]
    shared = 0
    while all(len(t) > shared + 1 and t[shared] == tokens[0][shared] for t in tokens):
        shared += 1
    for number, (entry, ids) in enumerate(zip(entries, tokens)):
        entry["shard"] = f"request-{number:05}.safetensors"
        entry["tokens"] = len(ids)
        entry["sha256"] = files.write_shard(folder / entry["shard"], ids, models.prefill(model, ids), args.dtype)
        print(f"{number + 1} of {len(entries)} requests, {len(ids)} tokens", flush=True)
    files.write_manifest(folder, {
        "schema": files.SCHEMA,
        "kvfuse_version": "0.1.0",
        "numerics": files.NUMERICS,
        "command": ["kvfuse-bridge", "dump", args.model],
        "model": files.model_entry(args.model, model),
        "data": data,
        "seed": 0,
        "dtype": args.dtype,
        "shared_prefix_tokens": shared,
        "stop": stop,
        "requests": entries,
    })
