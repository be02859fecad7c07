"""What the figures of writing are measured on is a store like any other."""

import numpy as np
import pytest

from common.store import Store
from common.store_verify import verify
from pipelines.bench import made, writing


def test_made_blocks_are_a_whole_store(tmp_path, monkeypatch):
    for name, value in {"_HIDDEN": 4, "_BLOCK": 2}.items():
        monkeypatch.setattr(writing, name, value)
    url = f"{tmp_path}/store"
    writing.write_blocks(url, 3, 8)
    found = verify(url)
    assert (found["damaged"], found["missing_blocks"]) == ([], 0)
    values = Store.open(url).read(["aux_hidden", "argmax"], [0, 2])
    np.testing.assert_array_equal(values["aux_hidden"][0], values["aux_hidden"][1])  # the same batch


@pytest.mark.slow
@pytest.mark.parametrize("committed", [0, 1, 9_999])
def test_a_billion_tokens_are_dealt_to_64_hosts(tmp_path, committed):
    """None twice, none forgotten, and as evenly as they go."""
    url, rows = f"{tmp_path}/store", 10**9 // 2048 + 1
    blocks = -(-rows // 32)
    done = np.random.default_rng(0).permutation(blocks)[:committed].tolist()
    made.huge_store(url, rows, 2048, 32, sorted(done))
    parts = writing.deal_to_hosts(url, 64)
    dealt = sorted(block for part in parts for block in part)
    assert dealt == sorted(set(range(blocks)) - set(done))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
