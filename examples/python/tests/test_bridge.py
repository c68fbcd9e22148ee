"""The bridge on a tiny random model; no network. `KVFUSE` names the binary (default: target/release/kvfuse)."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvfuse_bridge import __main__ as command
from kvfuse_bridge import files, score

ROOT = Path(__file__).resolve().parents[3]
KVFUSE = os.environ.get("KVFUSE", ROOT / "target/release/kvfuse")


def bridge(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kvfuse-bridge", *map(str, arguments)])
    command.main()


def kvfuse(*arguments):
    done = subprocess.run([KVFUSE, "-q", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tiny(tmp_path):
    """A random llama of two layers with a tokenizer of single letters, and a file of prompts."""
    letters = "abcdefghijklmnopqrstuvwxyz .?\n"
    vocab = {c: i for i, c in enumerate(letters)} | {"<end>": len(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=512, eos_token_id=len(letters), initializer_range=0.3)
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    prompts = tmp_path / "prompts.jsonl"
    text = "the ferry leaves the harbour at noon and returns at night. "
    lines = [{"prompt": text * n + "when?", "answers": ["at noon"]} for n in (1, 2, 3)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, prompts


def test_a_dump_is_read_by_kvfuse_and_holds_the_models_cache(tiny, tmp_path, monkeypatch):
    folder, prompts = tiny
    bridge(monkeypatch, "dump", "--model", folder, "--prompts", prompts, "-o", tmp_path / "dump", "--dtype", "f32")
    manifest = files.read_manifest(tmp_path / "dump")
    assert [r["tokens"] for r in manifest["requests"]] == [64, 123, 182]
    tokens, layers = files.read_shard(tmp_path / "dump", manifest["requests"][2])
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    for (keys, values), own in zip(layers, cache.layers):
        assert torch.allclose(keys, own.keys[0].transpose(0, 1), atol=1e-5)
        assert torch.allclose(values, own.values[0].transpose(0, 1), atol=1e-5)
    if not Path(KVFUSE).exists():
        pytest.skip("no kvfuse binary")
    assert "3" in kvfuse("inspect", tmp_path / "dump")
    kvfuse("stats", tmp_path / "dump", "-o", tmp_path / "stats")


def test_decoded_caches_are_scored_into_tables_that_compare_reads(tiny, tmp_path, monkeypatch):
    if not Path(KVFUSE).exists():
        pytest.skip("no kvfuse binary")
    folder, prompts = tiny
    bridge(monkeypatch, "dump", "--model", folder, "--prompts", prompts, "-o", tmp_path / "dump")
    decoded = []
    for name, method in (("p", "prefix:within-tenant=true"), ("k4", "prefix+kivi:bits=4"), ("k2", "prefix+kivi:bits=2")):
        kvfuse("encode", tmp_path / "dump", "--method", method, "-o", tmp_path / f"{name}.kv")
        kvfuse("decode", tmp_path / f"{name}.kv", "-o", tmp_path / name)
        decoded.append(tmp_path / name)
    bridge(monkeypatch, "score", "--model", folder, tmp_path / "dump", *decoded, "-o", tmp_path / "scored", "--max-new-tokens", 8)
    rows = list(csv.DictReader(open(tmp_path / "scored/sweep.csv")))
    assert [r["method"] for r in rows] == ["none", "prefix", "prefix:within-tenant=true", "prefix+kivi", "prefix+kivi:bits=2"]
    assert [r["kivi.bits"] for r in rows] == ["", "", "", "4", "2"]
    kl = [float(r["kl"]) for r in rows]
    assert kl[0] == kl[1] == kl[2] == 0.0 < kl[3] < kl[4]
    cr = [float(r["cr_audited"]) for r in rows]
    assert 0.99 < cr[0] < cr[1] < cr[3] < cr[4]
    assert abs(cr[2] / cr[1] - 1) < 1e-6, "the ledger and the bridge count prefix sharing alike"
    assert "kivi" in kvfuse("compare", tmp_path / "scored")
    kvfuse("plot", tmp_path / "scored")


def test_text_that_is_scored():
    assert score.f1("The Noon.", ["noon"]) == 1.0
    assert score.f1("at noon", ["noon"]) == pytest.approx(2 / 3)
    assert score.f1("", ["noon"]) == 0.0
    # Two requests share two whole blocks of three.
    assert score.prefix_ratio([[1] * 40, [1] * 36], 16) == (32 + 8 + 4, 6, 76)


def test_a_folder_that_is_no_dump_is_named(tmp_path):
    with pytest.raises(SystemExit, match="manifest.json: is no manifest of a dump"):
        files.read_manifest(tmp_path)
