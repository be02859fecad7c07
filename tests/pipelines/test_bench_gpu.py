"""The programs that are measured on a GPU, made small, run on any device."""

from dataclasses import replace

import pytest

from pipelines import recipes
from pipelines.bench import gpu
from pipelines.bench.published import PUBLISHED

SIZES = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256}


@pytest.mark.slow
def test_both_programs_run_and_count_their_work(monkeypatch):
    monkeypatch.setattr(gpu, "LENGTH", 64)
    monkeypatch.setattr(gpu, "ROWS", 2)
    monkeypatch.setitem(PUBLISHED, gpu.TRAINED, PUBLISHED[gpu.TRAINED] | SIZES)
    known = recipes.load(gpu.TRAINED)
    small = replace(
        known, layers=8, train=known.train | {"draft_vocab": 128}, dump=known.dump | {"chip_tokens": 128}
    )
    monkeypatch.setattr(recipes, "load", lambda name: small)
    for flops, seconds in (gpu.training_rate(gpu.TRAINED), gpu.dump_rate(gpu.TRAINED)):
        assert flops > 1e8
        assert seconds > 0


def test_where_no_gpu_is_the_figures_say_why():
    found = gpu.figures()
    assert set(found) == {"dump.gpu_mfu", "train.gpu_mfu"}
    assert all(figure["value"] is None and "no GPU" in figure["why"] for figure in found.values())
