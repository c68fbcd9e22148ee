"""A cache codec in another language, as an arm of a sweep: rounds a dump's keys and values to 8 bits a number.

    pip install numpy safetensors
    python examples/external_int8.py dumps/qa dumps/qa-int8
    kvfuse sweep dumps/qa --method prefix,int8,external:dir=dumps/qa-int8

What it writes is a dump (docs/dump-format.md) with the caches as they are read back, and in the manifest, for every request, the
bits that they took and the new shard's checksum (docs/external.md).
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


def rebuilt(x):
    """Keys or values `[tokens, kv_heads, head_dim]` from 8 bits a number and an f16 scale a token and head, and those bits."""
    scale = (np.abs(x).max(axis=-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    codes = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)).clip(-127, 127)
    return (codes * scale).astype(np.float32), 8 * codes.size + 16 * scale.size


def main(source, target):
    source, target = Path(source), Path(target)
    target.mkdir(parents=True)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["dtype"] = "f32"
    for request in manifest["requests"]:
        with safe_open(source / request["shard"], "np") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}
        request["bits"] = 0
        for name in tensors:
            if name != "tokens":
                tensors[name], bits = rebuilt(tensors[name].astype(np.float32))
                request["bits"] += bits
        save_file(tensors, target / request["shard"])
        request["sha256"] = hashlib.sha256((target / request["shard"]).read_bytes()).hexdigest()
    (target / "manifest.json").write_text(json.dumps(manifest, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
