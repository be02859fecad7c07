"""serve-check goes the whole way with a server of the tests' own, and refuses what is not as measured."""

import os
import pathlib
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import EyasError
from common.storage import read_json
from common.store import Store
from dump.chat import Chat
from pipelines.serving import check, environment
from pipelines.serving.config import ServeCheckConfig
from pipelines.serving.counters import Drafts
from tests.dump import tiny
from tests.pipelines.serving import model_server
from tests.train import small_store
from train.export import export
from train.heads.eagle3.head import Eagle3
from train.servers import Limit

OURS = {"length": 1.5, "by_position": [0.4, 0.1, 0.0], "drafts": 20.0}


def found(length=1.5, equal=1.0):
    layout = {"length": length, "of_ours": length and length / 1.5 - 1, "by_position": [], "drafts": 20}
    layout |= {"equal_answers": 4, "equal_tokens": equal}
    chain = OURS | {"equal_answers": 4}
    return {"ours": OURS, "chain": chain, "answers": 4, "layouts": {"portable": layout}}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (found(1.52), r"portable: 1\.5200 tokens a step, 1\.5000 expected"),
        (found(1.48), r"portable: 1\.4800 tokens a step"),
        (found(None), "portable: the server drafted nothing"),
        (found(equal=0.98), r"portable: 2\.0% of the tokens are not the target's"),
    ],
)
def test_a_head_that_is_served_otherwise_than_measured_is_refused(result, message):
    check.require_agreement(found(1.51), 0.01)
    with pytest.raises(EyasError, match=f"does not serve this head as it was measured: {message}"):
        check.require_agreement(result, 0.01)
    assert "portable" in check.table(result)


def test_an_answer_agrees_up_to_its_first_other_token():
    plain = [[1, 2, 3, 4, 9, 9], [5, 6]]  # asked for more than is compared
    its = check._figures([[1, 2, 7, 4], [5, 6]], plain, Drafts(10, 5, (4, 1)), OURS, 4)
    assert (its["equal_answers"], its["equal_tokens"]) == (1, 4 / 6)
    assert (its["length"], its["of_ours"], its["by_position"]) == (1.5, 0.0, [0.4, 0.1])


@pytest.fixture
def vllm(tmp_path):
    """An environment whose vLLM is the tests' own server."""
    program = tmp_path / "vllm" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n" + pathlib.Path(model_server.__file__).read_text())
    program.chmod(0o755)
    (tmp_path / "vllm" / "vllm.ready").write_text(f"{environment.VLLM} {environment.TORCH}\n")
    return str(tmp_path / "vllm")


def config(tmp_path, vllm, **variant):
    store = small_store.write_store(str(tmp_path / "store"))
    model = tiny.write_model(str(tmp_path / "model"))
    ids = np.arange(0, 64, 3)
    head = Eagle3.for_target(Store.open(store).target_config(), len(ids), (2, 4, 5), ffn=24, **variant)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 0.02, p.shape).astype(np.float32) for name, p in head.parameters().items()}
    folder = export(str(tmp_path / "head"), params, head, ids, Store.open(store).target_config())
    out = str(tmp_path / "served")
    return ServeCheckConfig(folder, store, model, out, prompts=3, answer_tokens=8, environment=vllm)


def test_no_server_is_set_up_for_what_it_cannot_take(tmp_path, monkeypatch):
    settings = config(tmp_path, str(tmp_path / "none"))
    monkeypatch.setattr(Eagle3, "limits", lambda head, target: [Limit("that", ("vllm",))])
    with pytest.raises(EyasError, match="vLLM cannot take that; train a head without it"):
        check.run(settings)
    assert not os.path.exists(settings.environment)
    with pytest.raises(ValueError, match="layouts='other' is none that vLLM loads"):
        ServeCheckConfig("head", "store", "model", "out", layouts=("other",))


@pytest.mark.slow
def test_every_layout_is_served_and_compared_with_the_walk_over_the_same_answers(tmp_path, vllm, monkeypatch):
    monkeypatch.setattr(Chat, "load", lambda model: SimpleNamespace(stops=frozenset()))
    settings, copy = config(tmp_path, vllm), check.copy_head

    def copied(head, *place):
        copy(head, *place)
        shutil.rmtree(settings.head, ignore_errors=True)  # its run goes on

    monkeypatch.setattr(check, "copy_head", copied)
    result = check.run(settings)
    assert 1 <= result["chain"]["length"] < 1.5
    assert result["chain"]["equal_answers"] == 0  # the tests' server answers what this target would not
    assert read_json(f"{settings.out}/serve-check.json") == result
    assert result["layouts"].keys() == {"portable", "speculators", "tpu-inference"}
    assert 1 <= result["ours"]["length"] < 1.5
    for layout, its in result["layouts"].items():
        assert (its["length"], its["equal_answers"], its["equal_tokens"]) == (2.0, 3, 1.0)
        with open(f"{settings.out}/{layout}.log") as log:
            assert "serving" in log.read()
    with pytest.raises(EyasError, match=r"portable: 2\.0000 tokens a step, 1\.\d+ expected; speculators: "):
        check.require_agreement(result, 0.01)
