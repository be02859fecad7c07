"""prepare on millions of tokens: its memory does not grow with them; cores change nothing but the time."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dump.chats import write_model
from tests.dump.test_prepare import contents

_SCRIPT = """
import json, sys
from common import zarr
from dump import rows, workers
from dump.prepare import PrepareConfig, run
from tests.memory import most_held

if __name__ == "__main__":
    data, model, store, cores = sys.argv[1:]
    workers.cores = lambda: int(cores)
    # What is held whole, a shard or some lines of the index, is full in both runs.
    zarr.ROWS_SHARD_BYTES, rows._PIECE, rows._LINES = 1 << 20, 1 << 18, 1 << 12
    found = run(PrepareConfig((data,), model, store))
    print(json.dumps({"tokens": found["tokens"], "peak": most_held()}))
"""
_BILLION, _MOST = 1e9, 4e9


def write_chats(folder: Path, tokens: int) -> str:
    """Three files of short conversations, of about so many tokens of the byte tokenizer, in all."""
    rng, made = random.Random(tokens), 0
    folder.mkdir()
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(500)]
    for name, opened in (("a.jsonl", open), ("b.jsonl.gz", gzip.open), ("c.jsonl", open)):
        goal = made + tokens // 3
        with opened(folder / name, "wt") as file:
            while made < goal:
                texts = [" ".join(rng.choices(words, k=rng.randint(2, 60))) for _ in range(2)]
                turns = [{"from": f, "value": v} for f, v in zip(("human", "gpt"), texts, strict=True)]
                record = {"id": f"{made // 1000:07d}_{made % 9}", "conversations": turns}
                file.write(json.dumps(record) + "\n")
                made += sum(map(len, texts)) + 60
    return str(folder)


@pytest.mark.slow
def test_memory_is_flat_and_cores_change_nothing(tmp_path):
    model = str(write_model(tmp_path / "model"))
    (tmp_path / "script.py").write_text(_SCRIPT)
    few, many = (write_chats(tmp_path / f"{n}", n * 1_000_000) for n in (5, 20))

    def prepared(data, store, cores):
        command = [
            sys.executable,
            str(tmp_path / "script.py"),
            data,
            model,
            str(tmp_path / store),
            str(cores),
        ]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return json.loads(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout)

    small, large = prepared(few, "small", 2), prepared(many, "large", 2)
    assert small["tokens"] > 4_000_000
    assert large["tokens"] > 16_000_000
    growth = (large["peak"] - small["peak"]) / (large["tokens"] - small["tokens"])
    print(f"{growth:.2f} bytes a token; {small}, {large}")
    assert large["peak"] + growth * _BILLION < _MOST
    prepared(few, "alone", 1)
    assert contents(tmp_path / "alone") == contents(tmp_path / "small")
