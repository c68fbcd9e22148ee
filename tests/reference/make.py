"""Makes tests/fixtures/reference.json: what transformers and llama.cpp say of tiny random models of every architecture.

    pip install torch transformers tokenizers safetensors gguf xllamacpp numpy
    python tests/reference/make.py

tests/reference.rs writes the same files from the fixture (weights are a hash of name and index) and compares token ids of odd
strings and log-probabilities.
"""

import json
import multiprocessing
import os
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).parent
HIDDEN, HEADS, KV_HEADS, DIM, WIDE, CONTEXT = 64, 4, 2, 16, 96, 512
TOP = 16
TEXT = """The ferry leaves the harbour at 9:45 in the morning and returns at 12:30. There are 1024 seats and they don't sell more.
The captain's log says that it's been raining, that the water was high and that nobody has been there since 1987.
She said: "We'll see what they have", and then the other boats were in the harbour as well. It was the best of the three
    and the rest of the harbour thought that the water there was the better of the two."""
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def weight(name, shape):
    """Numbers in [-1, 1) from FNV-1a of the name and the index, mixed as MurmurHash3 ends."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x01000193) & 0xFFFFFFFF
    h = (np.uint32(seed) + np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(0x9E3779B9)).astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h ^= h >> np.uint32(16)
    return ((h >> np.uint32(8)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def strings():
    """A hundred texts that tokenizers get wrong."""
    odd = [
        "a", " ", "  ", "   a", "a   ", "a  b   c    d", "\n", "\n\n", " \n \n a", "a\r\nb\r\n\r\nc", "\ta\t\tb", "\u00a0a\u00a0b", "\u3000a",
        "don't", "DON'T we'LL they'Re it'S I'M he'd", "' s't'", "``quoted''", "12345678", "1 22 333 4444 55555", "3.14159", "1,000,000",
        "x1y22z333", "\u0661\u0662\u0663", "\u00b2\u00b3\u00bd", "\u2167", "caf\u00e9", "cafe\u0301", "\u212b \u00c5 A\u030a", "\ufb01 f\u0131",
        "na\u00efve \u00dcbung stra\u00dfe", "\u65e5\u672c\u8a9e\u306e\u6587", "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "\ud55c\uad6d\uc5b4", "\u1112\u1161\u11ab",
        "\u05e9\u05dc\u05d5\u05dd", "\u0627\u0644\u0633\u0644\u0627\u0645", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "a\U0001f44d\U0001f3fdb", "\u200b", "a\u200bb", "a\u00adb", "\ufeffa", "\u202eabc",
        "\x00", "a\x00b", "\x07\x1b[0m", "\x7f", "\ud7ff", "\ue000", "\uffff", "\U0010ffff", "_", "__init__", "snake_case_name", "camelCaseName",
        "HTTPServer2Go", "foo(bar)[baz]{qux}", "a=b;c!=d", "!!!", "?!?!", "...", "\u2026", "\u2014dash\u2014", "\"quoted\"", "\u201cquoted\u201d", "#include <a.h>",
        "\\n\\t\\\\", "http://a.b/c?d=e&f=%20", "me@example.org", "$100 \u20ac5 \u00a33", "50%", "a/b\\c|d", "~`^", "<b>x</b>", "<s>", "</s>", "a<s>b</s>c",
        "<|endoftext|>", "x <|endoftext|> y", "<0x41>", "<unk>", "\u2581", "\u2581a\u2581\u2581b", "a \u2581 b", "Ġ", "Ġa", "\u010a",
        "the harbour", " the harbour", "The captain's log says that it's been raining, that the water was high",
        "harbour" * 12, "thethethethe", "THE HARBOUR", "tHe hArBoUr", "    indented\n        more\n\tand\n", "trailing \n", "a.b.c. d", "zzzzqqqq", "\u0130\u0131 \u1e9e",
    ]
    assert len(odd) >= 100, len(odd)
    return odd


def bytes_tokenizer(pre):
    """Byte-level BPE as tokenizer.json has it for a `tokenizer.ggml.pre`, and its GGUF metadata."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    split = lambda digits: pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", digits)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    cut = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        "qwen2": split(r"\p{N}"),
        "llama-bpe": split(r"\p{N}{1,3}"),
    }[pre]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = cut
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=256 + 90, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    bpe = models.BPE(vocab=model["vocab"], merges=[tuple(m.split(" ")) for m in merges], ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<s>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokens += special
    bos = pre == "llama-bpe"
    if bos:
        add_bos(tokenizer, "<s>")
    end, start = len(tokens) - 2, len(tokens) - 1
    metadata = {
        "tokenizer.ggml.model": ["str", "gpt2"], "tokenizer.ggml.pre": ["str", pre], "tokenizer.ggml.tokens": ["strs", tokens],
        "tokenizer.ggml.token_type": ["i32s", [1] * (len(tokens) - 2) + [3, 3]], "tokenizer.ggml.merges": ["strs", merges],
        "tokenizer.ggml.bos_token_id": ["u32", start], "tokenizer.ggml.eos_token_id": ["u32", end],
    }
    # llama.cpp puts a BOS in front by itself only for Llama 3.
    if not bos:
        metadata["tokenizer.ggml.add_bos_token"] = ["bool", False]
    return tokenizer, metadata


def sentence_piece(prefix):
    """SentencePiece BPE with byte fallback; `prefix`: a space in front of every text (Llama 2), or not (Gemma)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=140, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    order = [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]
    head = ["<unk>", "<s>", "</s>"]
    tokens = head + [f"<0x{b:02X}>" for b in range(256)] + order
    scores = [0.0] * 259 + [-float(i) for i in range(len(order))]
    vocab = {t: i for i, t in enumerate(tokens)}
    score = dict(zip(tokens, scores))
    # Every way to put a piece together, best piece first; of one piece's, those of earlier parts first (transformers'
    # conversion of SentencePiece models does the same).
    merges = []
    for piece in order:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        own = [c for c in cuts if c[0] in score and c[1] in score]
        merges += sorted(own, key=lambda c: (vocab[c[0]], vocab[c[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(([normalizers.Prepend("\u2581")] if prefix else []) + steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in head])
    add_bos(tokenizer, "<s>")
    metadata = {
        "tokenizer.ggml.model": ["str", "llama"], "tokenizer.ggml.pre": ["str", "default"], "tokenizer.ggml.tokens": ["strs", tokens],
        "tokenizer.ggml.scores": ["f32s", scores], "tokenizer.ggml.token_type": ["i32s", [2, 3, 3] + [6] * 256 + [1] * len(order)],
        "tokenizer.ggml.bos_token_id": ["u32", 1], "tokenizer.ggml.eos_token_id": ["u32", 2], "tokenizer.ggml.unknown_token_id": ["u32", 0],
        "tokenizer.ggml.add_space_prefix": ["bool", prefix],
    }
    return tokenizer, metadata


def add_bos(tokenizer, token):
    from tokenizers import processors

    pair = (token, tokenizer.token_to_id(token))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[pair])


def architecture(name, vocab):
    """config.json, GGUF metadata, and tensors: Hugging Face name -> [GGUF name, shape, kind, heads to interleave]."""
    layers = 7 if name == "gemma3" else 2
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                           "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM", "gemma3": "Gemma3ForCausalLM"}[name]],
        "model_type": {"gemma3": "gemma3_text"}.get(name, name), "hidden_size": HIDDEN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": DIM, "intermediate_size": WIDE, "num_hidden_layers": layers, "vocab_size": vocab,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": name in ("gemma3", "qwen2"),
    }
    gguf = {"llama": "llama", "mistral": "llama"}.get(name, name)
    key = {
        "general.architecture": ["str", gguf], f"{gguf}.context_length": ["u32", CONTEXT], f"{gguf}.embedding_length": ["u32", HIDDEN],
        f"{gguf}.block_count": ["u32", layers], f"{gguf}.feed_forward_length": ["u32", WIDE], f"{gguf}.attention.head_count": ["u32", HEADS],
        f"{gguf}.attention.head_count_kv": ["u32", KV_HEADS], f"{gguf}.attention.layer_norm_rms_epsilon": ["f32", 1e-5],
        f"{gguf}.rope.freq_base": ["f32", 5000.0], f"{gguf}.attention.key_length": ["u32", DIM], f"{gguf}.attention.value_length": ["u32", DIM],
        f"{gguf}.rope.dimension_count": ["u32", DIM],
    }
    if name == "mistral":
        config["sliding_window"] = None
    if name == "phi3":
        config.update(sliding_window=None, pad_token_id=0, original_max_position_embeddings=CONTEXT)
        key["phi3.rope.scaling.original_context_length"] = ["u32", CONTEXT]
        # llama.cpp does not read a window of phi3, but asks for it.
        key["phi3.attention.sliding_window"] = ["u32", CONTEXT]
    if name == "gemma3":
        config.update(sliding_window=8, query_pre_attn_scalar=DIM, rope_local_base_freq=800.0, hidden_activation="gelu_pytorch_tanh")
        key.update({"gemma3.attention.sliding_window": ["u32", 8], "gemma3.rope.freq_base_swa": ["f32", 800.0]})
    gain = "gain0" if name == "gemma3" else "gain"
    tensors = {"model.embed_tokens.weight": ["token_embd.weight", [vocab, HIDDEN], "weight", 0],
               "model.norm.weight": ["output_norm.weight", [HIDDEN], gain, 0]}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = ["output.weight", [vocab, HIDDEN], "weight", 0]
    q, kv = HEADS * DIM, KV_HEADS * DIM
    for n in range(layers):
        put = lambda hf, gg, shape, kind="weight", heads=0: tensors.__setitem__(f"model.layers.{n}.{hf}", [f"blk.{n}.{gg}", shape, kind, heads])
        interleaved = gguf == "llama"
        put("input_layernorm.weight", "attn_norm.weight", [HIDDEN], gain)
        if name == "phi3":
            put("self_attn.qkv_proj.weight", "attn_qkv.weight", [q + 2 * kv, HIDDEN])
            put("mlp.gate_up_proj.weight", "ffn_up.weight", [2 * WIDE, HIDDEN])
        else:
            put("self_attn.q_proj.weight", "attn_q.weight", [q, HIDDEN], heads=HEADS * interleaved)
            put("self_attn.k_proj.weight", "attn_k.weight", [kv, HIDDEN], heads=KV_HEADS * interleaved)
            put("self_attn.v_proj.weight", "attn_v.weight", [kv, HIDDEN])
            put("mlp.gate_proj.weight", "ffn_gate.weight", [WIDE, HIDDEN])
            put("mlp.up_proj.weight", "ffn_up.weight", [WIDE, HIDDEN])
        put("self_attn.o_proj.weight", "attn_output.weight", [HIDDEN, q])
        put("mlp.down_proj.weight", "ffn_down.weight", [HIDDEN, WIDE])
        if name == "qwen2":
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                put(f"self_attn.{part}_proj.bias", f"attn_{part}.bias", [rows])
        if name in ("qwen3", "gemma3"):
            for part in "qk":
                put(f"self_attn.{part}_norm.weight", f"attn_{part}_norm.weight", [DIM], gain)
        if name == "gemma3":
            put("post_attention_layernorm.weight", "post_attention_norm.weight", [HIDDEN], gain)
            put("pre_feedforward_layernorm.weight", "ffn_norm.weight", [HIDDEN], gain)
            put("post_feedforward_layernorm.weight", "post_ffw_norm.weight", [HIDDEN], gain)
        else:
            put("post_attention_layernorm.weight", "ffn_norm.weight", [HIDDEN], gain)
    return config, key, tensors


def numbers(name, shape, kind):
    """(Hugging Face, GGUF) numbers of a tensor."""
    x = weight(name, shape) * np.float32(0.25)
    return {"weight": (x, x), "gain": (1 + x, 1 + x), "gain0": (x, 1 + x)}[kind]


def interleaved(x, heads):
    """Rows of each head as llama GGUF files have them."""
    if not heads:
        return x
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_folder(path, config, tensors, tokenizer):
    from safetensors.numpy import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(tokenizer)
    save_file({name: numbers(name, shape, kind)[0] for name, (_, shape, kind, _) in tensors.items()}, path / "model.safetensors", {"format": "pt"})


def write_gguf(path, metadata, tensors):
    import gguf

    writer = gguf.GGUFWriter(str(path), metadata["general.architecture"][1])
    add = {"str": writer.add_string, "u32": writer.add_uint32, "f32": writer.add_float32, "bool": writer.add_bool}
    for key, (kind, value) in metadata.items():
        if key != "general.architecture":
            add.get(kind, writer.add_array)(key, value)
    for name, (own, shape, kind, heads) in tensors.items():
        writer.add_tensor(own, np.ascontiguousarray(interleaved(numbers(name, shape, kind)[1], heads)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def transformers_says(folder, texts, prompt):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Special tokens in a text are text, as in llama.cpp's parse_special = false.
    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    values, order = torch.log_softmax(logits, -1).topk(TOP)
    return ids, [[int(i), round(float(v), 6)] for i, v in zip(order, values)]


def llama_cpp_says(path, texts, prompt, out):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), CONTEXT, 1, False
    params.cpuparams.n_threads, params.verbosity, params.port = 2, 0, 18399
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def ask(end, body):
        request = urllib.request.Request(server.listening_address + end, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    ids = [ask("/tokenize", {"content": t, "add_special": True, "parse_special": False})["tokens"] for t in texts]
    answer = ask("/completion", {"prompt": prompt, "n_predict": 1, "n_probs": TOP, "temperature": 0})
    top = answer["completion_probabilities"][0]["top_logprobs"]
    out.put((ids, [[t["id"], round(t["logprob"], 6)] for t in top]))
    out.close()
    out.join_thread()
    os._exit(0)


def apart(path, texts, prompt):
    """llama.cpp in a process of its own: its server does not end by itself."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=llama_cpp_says, args=(path, texts, prompt, out))
    process.start()
    said = out.get(timeout=120)
    process.join()
    return said


def main():
    texts = strings()
    tokenizers = {pre: bytes_tokenizer(pre) for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe")}
    tokenizers |= {"sentence-piece": sentence_piece(True), "sentence-piece-no-prefix": sentence_piece(False)}
    pairs = [("llama", "smollm"), ("llama", "gpt-2"), ("llama", "llama-bpe"), ("llama", "sentence-piece"), ("mistral", "sentence-piece"),
             ("qwen2", "qwen2"), ("qwen3", "qwen2"), ("phi3", "sentence-piece"), ("gemma3", "sentence-piece-no-prefix")]
    cases = []
    for name, tokenizer_name in pairs:
        tokenizer, words = tokenizers[tokenizer_name]
        vocab = len(words["tokenizer.ggml.tokens"][1])
        config, metadata, tensors = architecture(name, vocab)
        prompt = [(i * i * 31 + i * 7 + 5) % (vocab - 10) for i in range(40)]
        with tempfile.TemporaryDirectory() as place:
            place = Path(place)
            write_folder(place / "folder", config, tensors, tokenizer.to_str())
            write_gguf(place / "model.gguf", metadata | words, tensors)
            ids, top = transformers_says(place / "folder", texts, prompt)
            llama_ids, llama_top = apart(place / "model.gguf", texts, prompt)
        differ = [t for t, a, b in zip(texts, ids, llama_ids) if a != b]
        worst = max(abs(v - dict(llama_top).get(i, v)) for i, v in top)
        print(f"{name}, {tokenizer_name}: {len(differ)} texts differ between the two {differ}, log-probabilities by {worst:.1e}")
        cases.append({"name": name, "tokenizer": tokenizer_name, "config": config, "metadata": metadata, "tensors": tensors, "prompt": prompt,
                      "transformers": {"ids": ids, "top": top}, "llama.cpp": {"ids": llama_ids, "top": llama_top}})
    fixture = {
        "versions": versions(), "texts": texts,
        "tokenizers": {name: {"json": json.loads(t.to_str()), "metadata": words} for name, (t, words) in tokenizers.items()}, "cases": cases,
    }
    (HERE.parent / "fixtures" / "reference.json").write_text(json.dumps(fixture, ensure_ascii=True, separators=(",", ":")) + "\n")


def versions():
    from importlib.metadata import version

    return {package: version(package) for package in ("transformers", "tokenizers", "torch", "xllamacpp", "gguf")}


if __name__ == "__main__":
    main()
