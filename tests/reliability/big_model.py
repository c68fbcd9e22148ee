"""Writes a GGUF file of the shape of Llama-3-8B (Q4_0 or Q4_K, random codes, SmolLM2's tokenizer) and dumps caches with it.

Usage: big_model.py KVFUSE SMOLLM2.gguf [FOLDER] [Q4_0|Q4_K]; needs the packages gguf and numpy, 5 GB of disk, 6 GB of memory.
Prints the file's size and the peak resident memory of `kvfuse dump` and `kvfuse sweep`.
"""

import pathlib
import resource
import subprocess
import sys
import tempfile

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDE, VOCAB = 4096, 32, 32, 8, 14336, 128256


def codes(rng, kind, shape):
    """Blocks of a quantised matrix: random codes, scales that keep activations of order one."""
    rows, columns = shape
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // numbers, size), dtype=np.uint8)
    scale = np.float16(0.2 / np.sqrt(columns))
    if kind == gguf.GGMLQuantizationType.Q4_0:
        blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    else:
        # Codes from 0 to 15 times the scale of a group (up to 63 of these), less a minimum (likewise): 7 to 8 of the one a unit of the other.
        blocks[..., :2] = np.frombuffer(np.float16(scale / 40).tobytes(), np.uint8)
        blocks[..., 2:4] = np.frombuffer(np.float16(7.5 * scale / 40).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(path, tokenizer, kind):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    reader = gguf.GGUFReader(tokenizer)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            value = field.contents()
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub_type=sub)

    def matrix(name, outputs, inputs):
        writer.add_tensor(name, codes(rng, kind, (outputs, inputs)), raw_dtype=kind)

    def ones(name):
        writer.add_tensor(name, np.ones(HIDDEN, np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    matrix("output.weight", VOCAB, HIDDEN)
    ones("output_norm.weight")
    kv = HIDDEN // HEADS * KV_HEADS
    for n in range(LAYERS):
        ones(f"blk.{n}.attn_norm.weight")
        ones(f"blk.{n}.ffn_norm.weight")
        matrix(f"blk.{n}.attn_q.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{n}.attn_k.weight", kv, HIDDEN)
        matrix(f"blk.{n}.attn_v.weight", kv, HIDDEN)
        matrix(f"blk.{n}.attn_output.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{n}.ffn_gate.weight", WIDE, HIDDEN)
        matrix(f"blk.{n}.ffn_up.weight", WIDE, HIDDEN)
        matrix(f"blk.{n}.ffn_down.weight", HIDDEN, WIDE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peak_gib(command):
    """Peak resident memory of a command, from the kernel."""
    child = subprocess.Popen(command)
    _, status, usage = __import__("os").wait4(child.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss / 2**20


def main():
    kvfuse, tokenizer = sys.argv[1:3]
    folder = pathlib.Path(sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp())
    kind = gguf.GGMLQuantizationType[sys.argv[4] if len(sys.argv) > 4 else "Q4_0"]
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / f"8b-{kind.name}.gguf"
    if not model.exists():
        write(model, tokenizer, kind)
    print(f"{model}: {model.stat().st_size / 2**30:.2f} GiB")
    dump = folder / f"dump-{kind.name}"
    made = peak_gib([kvfuse, "dump", "--model", model, "--data", "builtin:qa", "--requests", "2", "--shots", "0", "--dtype", "f16", "-o", dump])
    print(f"dump: peak {made:.2f} GiB")
    sweep = [kvfuse, "sweep", dump, "--method", "prefix,prefix+kivi:bits=4", "--max-new-tokens", "4", "-o", dump / "sweep"]
    print(f"sweep: peak {peak_gib(sweep):.2f} GiB")


if __name__ == "__main__":
    main()
