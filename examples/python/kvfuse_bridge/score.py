"""`kvfuse-bridge score`: what decoded caches do to a transformers model, as the tables of a sweep.

Like `kvfuse sweep` (docs/sweep-columns.md): the cache of all prompt tokens but the last; a request's first reference as it continues the
prompt, and what ends it, teacher-forced; KL of the next-token distributions from those of the unencoded cache, in nats a token, mean over
tokens and then requests; greedy answers scored by token F1.
"""

import collections
import csv
import hashlib
import re
import string
from pathlib import Path

import numpy as np

from . import files, models

MOST_TARGETS = 64
ENTRY_BITS = 32


def targets(tokenizer, request, stop):
    """Tokens that distributions are compared on: a reference as it continues the prompt, and what ends it."""
    if not request["references"]:
        raise SystemExit(f"error: request {request['id']} has no reference answer; dump prompts with answers")
    prompt = request["prompt"]
    space = "" if not prompt or prompt[-1].isspace() else " "
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(prompt + space + request["references"][0])["input_ids"]
    wanted = after[len(before):]
    if len(wanted) >= MOST_TARGETS:
        return wanted[:MOST_TARGETS]
    end = tokenizer(stop)["input_ids"][-1] if stop else tokenizer.eos_token_id
    return wanted + [end]


def greedy(model, tokenizer, cache, last, position, stop, most):
    """The greedy answer's text, up to `stop`; the token `last` stands at `position`."""
    answer, token = [], last
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
    while len(answer) < most:
        token = int(models.logits(model, cache, [token], position + len(answer))[-1].argmax())
        if token in ends:
            break
        answer.append(token)
        if stop and stop in tokenizer.decode(answer):
            break
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return text.split(stop)[0] if stop else text


def f1(answer, references):
    """SQuAD's token F1 against the best reference."""
    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def one(reference):
        got, wanted = words(answer), words(reference)
        common = sum((collections.Counter(got) & collections.Counter(wanted)).values())
        return 2 * common / (len(got) + len(wanted)) if common else float(got == wanted)

    return max(map(one, references))


def interval(x, resamples, seed):
    """Mean and 95 % bootstrap interval over requests."""
    x = np.asarray(x, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    low, high = np.quantile(x[drawn].mean(axis=1), [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def prefix_ratio(shards, block_size):
    """Tokens that exact prefix sharing stores, block-table entries, and all tokens: blocks that begin alike up to their end are stored once."""
    stored, entries, total, chains = 0, 0, 0, {}
    for tokens in shards:
        before = None
        for at in range(0, len(tokens), block_size):
            own = tuple(tokens[at:at + block_size])
            entries += 1
            total += len(own)
            new = len(chains)
            before = chains.setdefault((before, own), new)
            if len(own) < block_size or before == new:
                stored += len(own)
    return stored, entries, total


class Source:
    """The unencoded dump that all arms are compared with, and the model."""

    def __init__(self, args):
        self.model, self.tokenizer = models.load(args.model, args.device)
        self.manifest = files.read_manifest(args.dump)
        self.stop = self.manifest.get("stop")
        self.requests = self.manifest["requests"]
        self.tokens = [files.read_shard(args.dump, request)[0] for request in self.requests]
        self.targets = [targets(self.tokenizer, request, self.stop) for request in self.requests]
        self.reference = {}
        config = self.manifest["model"]["config"]
        self.layers = config["layers"]
        self.width = 2 * config["layers"] * config["kv_heads"] * config["head_dim"]
        stored, entries, total = prefix_ratio(self.tokens, args.block_size)
        self.elements = self.width * total
        self.table_bits = ENTRY_BITS * entries * self.layers
        self.prefix_bits = 16 * self.width * stored + self.table_bits
        self.cr_prefix = 16 * self.elements / self.prefix_bits

    def decoded(self, folder):
        """Layers of a dump, all prompt tokens but the last, one request at a time."""
        manifest = files.read_manifest(folder)

        def layers(number):
            tokens, layers = files.read_shard(folder, manifest["requests"][number])
            if tokens != self.tokens[number]:
                raise SystemExit(f"error: {folder}: request {number} has other tokens than the dump it is compared with")
            return [(keys[:-1], values[:-1]) for keys, values in layers]

        return layers

    def measure(self, layers, most):
        """Per request: KL of every target token, top-1 agreement, answer's text and F1. The first arm is the reference."""
        rows = []
        for number, request in enumerate(self.requests):
            wanted, last, position = self.targets[number], self.tokens[number][-1], len(self.tokens[number]) - 1
            held = layers(number)
            own = models.logits(self.model, models.cache_of(held, self.model), [last, *wanted[:-1]], position).log_softmax(-1)
            p = self.reference.setdefault(number, own)
            kl = (p.exp() * (p - own)).sum(-1).clamp(min=0)
            answer = greedy(self.model, self.tokenizer, models.cache_of(held, self.model), last, position, self.stop, most)
            rows.append({
                "id": request["id"],
                "kl": kl.cpu().numpy(),
                "top1": float((p.argmax(-1) == own.argmax(-1)).double().mean()),
                "nll": float(-own[range(len(wanted)), wanted].mean()),
                "answer": answer.strip(),
                "f1": f1(answer, request["references"]),
            })
        return rows


def write(args, source, arms):
    """Measures arms (method, options, bits, layers of a request), the unencoded one first, and writes sweep.csv and requests.csv."""
    sweep, requests, options, none = [], [], set(), None
    for method, own_options, bits, layers in arms:
        rows = source.measure(layers, args.max_new_tokens) if layers else none
        none = none or rows
        run_id = hashlib.sha256(f"{method} {args.dump} {args.model}".encode()).hexdigest()[:12]
        means = [float(r["kl"].mean()) for r in rows]
        tokens = np.concatenate([r["kl"] for r in rows])
        row = {"run": run_id, "model": source.manifest["model"]["name"], "data": source.manifest["data"]["name"], "method": method,
               "block_size": args.block_size, "batch": len(rows), "first_token": "fused"}
        # As a sweep writes them.
        row |= {name: str(value).lower() if isinstance(value, bool) else value for name, value in own_options.items()}
        options |= own_options.keys()
        cr = 16 * source.elements / bits
        row |= {"seed": args.seed, "requests": len(rows), "elements": source.elements, "bits_per_element": bits / source.elements,
                "cr_audited": cr, "cr_paper": "", "layer_cr": "", "cr_prefix": source.cr_prefix, "cr_beyond_prefix": cr / source.cr_prefix}
        for name, x in (("kl", means), ("top1", [r["top1"] for r in rows]), ("nll", [r["nll"] for r in rows]),
                        ("f1", [r["f1"] for r in rows]), ("f1_diff", [r["f1"] - n["f1"] for r, n in zip(rows, none)])):
            row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(x, args.resamples, args.seed)
        row |= {"metric": "F1"} | {name.replace("f1", "score"): row[name] for name in list(row) if name.startswith("f1")}
        row |= {"kl_p95": np.quantile(tokens, 0.95), "kl_p99": np.quantile(tokens, 0.99), "kl_max": tokens.max()}
        sweep.append(row)
        for r, n, kl in zip(rows, none, means):
            requests.append({"run": run_id, "method": method, "id": r["id"], "f1": r["f1"], "f1_none": n["f1"], "score": r["f1"],
                             "score_none": n["f1"], "kl": kl, "nll": r["nll"], "answer": r["answer"], "answer_none": n["answer"]})
        print(f"{method}: CR {cr:.3g}, KL {row['kl']:.4f} [{row['kl_low']:.4f}, {row['kl_high']:.4f}], F1 {row['f1']:.3f}", flush=True)
        save(args.out, sweep, requests, options)


def save(out, sweep, requests, options):
    """Writes the tables of the arms there are, each whole or not at all."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("sweep.csv", sweep), ("requests.csv", requests)):
        columns = list(dict.fromkeys(key for row in table for key in row if key not in options))
        if name == "sweep.csv":
            # Columns of options stand with the method's, as a sweep has them.
            at = columns.index("first_token") + 1
            columns[at:at] = sorted(options)
        part = out / f"{name}.part"
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        part.replace(out / name)


def controls(args, source):
    """The unencoded arm, and exact prefix sharing, which answers like it."""
    return [
        ("none", {}, 16 * source.elements + source.table_bits, source.decoded(args.dump)),
        ("prefix", {"prefix.within-tenant": "false"}, source.prefix_bits, None),
    ]


def run(args):
    source = Source(args)
    arms = controls(args, source)
    for folder in args.decoded:
        manifest = files.read_manifest(folder)
        if not manifest.get("encoded") or any(r.get("bits") is None for r in manifest["requests"]):
            raise SystemExit(f"error: {folder}: does not say what it was encoded by; write it with kvfuse decode")
        by = manifest["encoded"]
        arms.append((by["method"], by["options"], sum(r["bits"] for r in manifest["requests"]), source.decoded(folder)))
    write(args, source, arms)
