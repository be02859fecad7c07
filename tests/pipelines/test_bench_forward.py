"""The figures of a forward pass are those of the dump's own program."""

import jax
import pytest

from dump import target
from dump.target.flops import needed_flops
from pipelines.bench import forward
from tests.dump import tiny


def test_a_row_four_times_as_long_needs_about_four_times_the_memory(tmp_path):
    found = forward.attention_growth(tiny.write_model(f"{tmp_path}/model"))["dump.attention_growth"]
    assert 1 < found["value"] <= found["at_most"] == 4.5


def test_the_peak_fraction_is_of_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "_TOKENS", 64)
    monkeypatch.setattr(forward, "_LENGTHS", (16, 32))
    monkeypatch.setattr(forward, "times", lambda run, _: [jax.block_until_ready(run()) and 0.5])
    monkeypatch.setattr(forward, "matmul_rate", lambda: 1e9)
    model = tiny.write_model(f"{tmp_path}/model")
    found = forward.peak_fraction(model)["dump.peak_fraction"]
    assert found["value"] == pytest.approx(needed_flops(target.read_config(model), 16) * 64 / 0.5 / 1e9)
