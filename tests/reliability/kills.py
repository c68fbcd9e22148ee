"""Kills kvfuse at random moments and runs it again: nothing finished is lost, and tables and files are those of a run that nobody disturbed.

    python3 tests/reliability/kills.py [KILLS] [KVFUSE]

dump, train, sweep in three lots, shards and merge, encode, on a tiny model (that of the fuzzer's sound files) and 48 prompts; serve-bench
measures time and so never writes the same table twice: of it, every run that was finished must stay as it was.
"""

import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
KVFUSE = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else ROOT / "target/release/kvfuse")
SWEEP = "prefix+bff:tau=0.95:0.6:0.05,prefix+kivi:bits=4|2,int8"


def kvfuse(*arguments, kill_after=None):
    """Runs to the end, or kills with SIGKILL after so many seconds; True if it ended by itself."""
    process = subprocess.Popen([KVFUSE, "-q", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    assert process.returncode == 0, f"{arguments}: {said}"
    return True


def files(folder, names):
    """Checksums of the files that must be the same."""
    folder = Path(folder)
    found = [folder] if folder.is_file() else sorted(p for name in names for p in folder.rglob(name))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def check_whole(folder):
    """Nothing half-written stands under a final name: every table has rows of one length, every JSON can be read."""
    for path in Path(folder).rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = list(csv.reader(path.open()))
            assert rows and len({len(row) for row in rows}) == 1, path


def disturbed(name, out, names, commands, kills, rng):
    """Runs commands once in peace, then again and again with kills until so many have hit; compares."""
    out = Path(out)
    started = time.time()
    for command in commands:
        kvfuse(*command)
    seconds = time.time() - started
    wanted = files(out, names)
    assert wanted, f"{name} wrote nothing of {names}"
    hits = runs = 0
    while hits < kills:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        for command in commands:
            # What was killed is run again by the same command; each try gets further, so a run that takes long still ends.
            tries = 0
            while not kvfuse(*command, kill_after=rng.uniform(0.0, seconds / len(commands)) * (1 + tries / 8) if hits < kills else None):
                hits += 1
                tries += 1
                if out.is_dir():
                    check_whole(out)
        runs += 1
        got = files(out, names)
        assert got == wanted, f"{name}: differs in {sorted(k for k in wanted | got if wanted.get(k) != got.get(k))}"
    print(f"{name}: {hits} kills in {runs} runs of {seconds:.1f} s, all the same", flush=True)


def main():
    rng = random.Random(1)
    work = Path(tempfile.mkdtemp(prefix="kvfuse-kills-"))
    os.chdir(work)
    model = work / "model"
    for part in ("config", "safetensors"):
        shutil.copytree(ROOT / "fuzz/sound" / part, model, dirs_exist_ok=True)
    words = "the ferry leaves harbour at noon and night returns with lamp".split()
    lines = [json.dumps({"prompt": " ".join(rng.choice(words) for _ in range(20)) + "?", "answers": ["noon"]}) for _ in range(48)]
    Path("prompts.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--data", "prompts:prompts.jsonl", "--requests", "48"]
    dump = ["dump", "--model", model, *data, "-o", "dump"]
    share = KILLS // 6
    disturbed("dump", "dump", ["*.safetensors", "manifest.json"], [dump], share, rng)
    disturbed("train", "joint.safetensors", [], [["train", "dump", "-o", "joint.safetensors", "--rank", "2"]], share, rng)
    disturbed("encode", "x.kv", [], [["encode", "dump", "--method", "prefix+kivi:residual=4", "-o", "x.kv"]], share, rng)
    tables = ["sweep.csv", "requests.csv", "layers.csv"]
    sweep = ["sweep", "dump", "--method", SWEEP, "--batch", "16", "--max-new-tokens", "16"]
    disturbed("sweep", "swept", tables, [[*sweep, "-o", "swept"]], share, rng)
    shards = [[*sweep, "-o", "shards", "--shard", f"{i}/3"] for i in range(3)]
    disturbed("shards and merge", "shards", tables, [*shards, ["merge", "shards"]], share, rng)
    assert files("swept", tables).items() <= files("shards", tables).items(), "shards give other tables than one process"
    bench = ["serve-bench", "--model", model, *data, "--method", "none,prefix", "--budget-requests", "8", "--output-len", "16"]
    bench += ["--repeats", "4", "-o", "served"]
    started = time.time()
    kvfuse(*bench)
    seconds, hits, whole = time.time() - started, 0, 1
    shutil.rmtree("served")
    kept = {}
    while hits < KILLS - 5 * share:
        ended = kvfuse(*bench, kill_after=rng.uniform(0.0, seconds))
        check_whole("served")
        now = files("served/runs", ["*.json"])
        assert kept.items() <= now.items(), "serve-bench lost a finished run"
        kept = now
        hits += not ended
        if ended:
            assert len(now) == 8 and len(list(csv.reader(open("served/serve.csv")))) == 9
            shutil.rmtree("served")
            kept, whole = {}, whole + 1
    print(f"serve-bench: {hits} kills in {whole} benches of {seconds:.1f} s, no finished run lost or changed")
    shutil.rmtree(work)


main()
