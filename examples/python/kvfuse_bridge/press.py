"""`kvfuse-bridge press`: presses of NVIDIA's kvpress as methods beside kvfuse's own, in the tables of a sweep.

A press drops tokens of each head of each layer as the prompt is prefilled. What is left is charged 16 bits a number and 32 bits an entry of a
block table of 16 tokens; keys hold their positions (RoPE), so none are stored. The press sees all prompt tokens but the last, and not the
question apart from them, as every method of a sweep does.
"""

import torch
from transformers import DynamicCache

from . import models, score


def run(args):
    import kvpress

    source = score.Source(args)
    arms = score.controls(args, source)
    for name in args.press:
        made = getattr(kvpress, name, None)
        if made is None:
            raise SystemExit(f"error: --press {name}: kvpress has no such press")
        for ratio in args.ratio:
            arms.append(pressed(source, name, made(compression_ratio=ratio), ratio, args.block_size))
    score.write(args, source, arms)


def pressed(source, name, press, ratio, block_size):
    """An arm (method, options, bits, caches) of a press: the caches are made once and kept."""
    kept = []
    bits = 0
    for tokens in source.tokens:
        cache = DynamicCache()
        ids = torch.tensor([tokens[:-1]], device=source.model.device)
        with torch.no_grad(), press(source.model):
            source.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = models.layers_of(cache)
        for keys, values in layers:
            bits += 16 * (keys.numel() + values.numel()) + 32 * -(-len(keys) // block_size)
        # The last prompt token is part of what is charged, as it is of every arm.
        bits += 16 * source.width
        kept.append(layers)

    def cache(number):
        layers = kept[number]
        return models.cache_of(layers, len(layers[0][0]), source.model.device, source.model.dtype)

    return f"{name}:ratio={ratio}", {f"{name}.ratio": ratio}, bits, cache
