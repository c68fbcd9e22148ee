"""`kvfuse-bridge press`: presses of NVIDIA's kvpress as methods beside kvfuse's own, in the tables of a sweep.

A press drops tokens of each head of each layer as the prompt is prefilled. What is left is charged 16 bits a number and 32 bits an entry of a
block table of 16 tokens; keys hold their positions (RoPE), so none are stored. The press sees all prompt tokens but the last, and not the
question apart from them, as every method of a sweep does.
"""

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
    """An arm (method, options, bits, layers of a request) of a press: its caches are made once and kept."""
    kept = []
    bits = 0
    for tokens in source.tokens:
        with press(source.model):
            layers = models.prefill(source.model, tokens[:-1])
        for keys, values in layers:
            bits += 16 * (keys.numel() + values.numel()) + 32 * -(-len(keys) // block_size)
        # The last prompt token is part of what is charged, as it is of every arm.
        bits += 16 * source.width
        kept.append(layers)
    return f"{name}:ratio={ratio}", {f"{name}.ratio": ratio}, bits, kept.__getitem__
