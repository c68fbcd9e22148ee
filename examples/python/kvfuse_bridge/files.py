"""Dumps as kvfuse has them (docs/dump-format.md)."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SCHEMA = 2
NUMERICS = 2
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def read_manifest(folder):
    """The manifest of a dump; an error names the folder if it is none, or not finished."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        missing = [r["shard"] for r in manifest["requests"] if not r.get("sha256")]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"error: {path}: is no manifest of a dump ({error})") from error
    if manifest["schema"] != SCHEMA:
        raise SystemExit(f"error: {path}: has schema {manifest['schema']}, this reads {SCHEMA}; dump again")
    if missing:
        raise SystemExit(f"error: {path}: lacks {missing[0]}; finish the dump")
    return manifest


def read_shard(folder, request):
    """Token ids, and keys and values of every layer `[tokens, kv_heads, head_dim]`, of one request of a dump."""
    path = Path(folder) / request["shard"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != request["sha256"]:
        raise SystemExit(f"error: {path}: is not the shard that the manifest lists; dump again")
    tensors = load_file(path)
    layers = sum(name.endswith(".key") for name in tensors)
    cache = [(tensors[f"layer.{n}.key"], tensors[f"layer.{n}.value"]) for n in range(layers)]
    return tensors["tokens"].tolist(), cache


def write_shard(path, tokens, cache, dtype):
    """Writes one request's shard under its final name only when it is whole; returns its checksum."""
    tensors = {"tokens": torch.tensor(tokens, dtype=torch.int64)}
    for n, (keys, values) in enumerate(cache):
        for name, numbers in (("key", keys), ("value", values)):
            stored = numbers.detach().to("cpu", DTYPES[dtype]).contiguous()
            if not torch.isfinite(stored).all():
                raise SystemExit(f"error: {path}: layer {n}: a {name} does not fit into {dtype}; pass --dtype bf16 or f32")
            tensors[f"layer.{n}.{name}"] = stored
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    os.replace(part, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(folder, manifest):
    path = Path(folder) / "manifest.json"
    part = path.with_name("manifest.json.part")
    part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    os.replace(part, path)


def model_entry(name, model):
    """A manifest's `model`: sizes that codecs and statistics go by, and a checksum of the weights."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    # Layers with embeddings of their own have a table each; the first that is no sliding one's stands for all.
    rope = rope.get("full_attention", rope)
    base = rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).tobytes())
    return {
        "name": name,
        "sha256": digest.hexdigest(),
        "config": {
            "architecture": config.model_type,
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": head_dim,
            "intermediate": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            "vocab": config.vocab_size,
            "context": getattr(config, "max_position_embeddings", 0) or 0,
            "rms_epsilon": getattr(config, "rms_norm_eps", None) or 1e-5,
            "rope": {"base": float(base), "dims": head_dim},
        },
    }
