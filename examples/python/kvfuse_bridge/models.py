"""Models of transformers, and their caches as lists of layers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def load(name, device="cpu", dtype=torch.float32):
    """Model and tokenizer of a hub name, a folder or a GGUF file."""
    path = Path(name)
    where, more = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    tokenizer = AutoTokenizer.from_pretrained(where, **more)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **more)
    return model.to(device).eval(), tokenizer


def layers_of(cache):
    """Keys and values of every layer, `[tokens, kv_heads, head_dim]`, of a cache of one request."""
    found = []
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None or layer.keys.dim() != 4:
            raise SystemExit("error: this model's cache is no plain keys and values a layer")
        found.append((layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)))
    return found


def cache_of(layers, model):
    """A transformers cache that holds `layers`, for a model to go on from."""
    cache = DynamicCache()
    for n, (keys, values) in enumerate(layers):
        part = [x.to(model.device, model.dtype).transpose(0, 1)[None] for x in (keys, values)]
        cache.update(*part, n)
    return cache


@torch.no_grad()
def prefill(model, tokens):
    """The cache of a prompt, layer by layer."""
    cache = DynamicCache()
    ids = torch.tensor([tokens], device=model.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return layers_of(cache)


@torch.no_grad()
def logits(model, cache, tokens, position):
    """Next-token logits `[tokens, vocab]`, f64, of tokens that follow a cache, which grows by them; the first stands at `position`, which
    is not the cache's length where tokens were dropped from it."""
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(position, position + len(tokens), device=model.device)[None]
    return model(ids, past_key_values=cache, use_cache=True, position_ids=positions).logits[0].double()
