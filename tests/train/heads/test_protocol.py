"""Nothing outside of a head's own package knows what is in it: a kind nothing like EAGLE3 does all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

from common import storage
from common.config import differences, knobs, setting
from common.errors import EyasError
from common.params import initialise
from common.store import Store
from pipelines.recipes import beneath
from tests.train import small_store
from tests.train.heads import kinds, medusa
from tests.train.small_run import assert_same_run, lines_of, weights_of
from train import check_export
from train.config import EvaluateConfig, TrainConfig
from train.evaluate import estimate, load_head
from train.export import export
from train.heads import KINDS, require_apart
from train.heads.head import HEADS
from train.plan import room
from train.planning import make_plan
from train.run import run
from train.source import Source
from train.stream import Stream
from train.warm_start import open_published


@pytest.fixture(autouse=True)
def another_kind(monkeypatch):
    medusa.register(monkeypatch)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return small_store.write_store(str(tmp_path_factory.mktemp("protocol") / "store"))


def config(url, out, **changes):
    settings = {"steps": 24, "batch_rows": 4, "ttt_steps": 3, "draft_vocab": 48, "learning_rate": 1e-2}
    settings |= {"optimizer": "adamw", "init": "target", "eval_every": 12, "log_every": 4}
    return medusa.Config(url, str(out), **settings | changes)


def test_another_kind_trains_is_exported_and_is_trained_on(url, tmp_path):
    """With a setting of its own, and random numbers of its own, drawn again where a run is continued."""
    first = config(url, tmp_path / "run", dropout=0.1, save_every=5)
    run(first)
    losses = [line["loss"] for line in lines_of(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    best = f"{tmp_path}/run/best"
    assert any("blocks: 2" in line for line in check_export.check(best, small_store.TARGET))
    assert storage.read_json(f"{best}/config.json")["architectures"] == ["MedusaModel"]
    figures = estimate(Source(url), EvaluateConfig(best, url, 3))
    lengths = [x["evaluation"]["length_greedy"] for x in lines_of(tmp_path / "run") if "evaluation" in x]
    assert figures["length_greedy"] == pytest.approx(max(lengths), rel=1e-2)  # in bfloat16
    with pytest.raises(EyasError, match="of no head of kind=eagle3; give --kind medusa"):
        make_plan(config(url, tmp_path / "other", init=best, kind="eagle3"))
    with pytest.raises(EyasError, match="leave blocks out"):
        make_plan(config(url, tmp_path / "more", init=best, blocks=3))
    on = replace(first, out=str(tmp_path / "on"), init=best, steps=1, learning_rate=1e-9)
    run(replace(on, draft_vocab=None))
    for name, weight in weights_of(tmp_path / "on").items():
        np.testing.assert_allclose(weight, weights_of(tmp_path / "run", "best")[name], rtol=1e-2, atol=1e-6)


def test_it_is_the_same_on_another_number_of_chips_and_when_continued(url, tmp_path):
    whole = config(url, tmp_path / "whole", dropout=0.2, accumulate=1, steps=6)
    run(whole)
    run(replace(whole, out=str(tmp_path / "again")))
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    run(replace(whole, out=str(tmp_path / "two"), dp=2))
    for name, weight in weights_of(tmp_path / "two").items():
        np.testing.assert_allclose(weight, weights_of(tmp_path / "whole")[name], rtol=1e-2, atol=1e-3)


def test_what_a_kind_does_not_read_is_not_read(url):
    """Neither is it asked for in vain."""
    plan = make_plan(config(url, "unused"))
    names = Stream(Store.open(url), plan.mesh, [plan.view])._names
    assert "last_hidden" in names
    assert "aux_hidden" not in names
    for wrong, message in {
        "noise": (0.1, "the head reads none"),
        "aux_layers": ((2, 4), "kind=medusa reads no aux states"),
    }.items():
        value, text = message
        with pytest.raises(EyasError, match=text):
            make_plan(config(url, "unused", **{wrong: value}))


def test_it_needs_what_it_reads(tmp_path):
    url = small_store.write_store(str(tmp_path / "store"), "topk", last_rows=4)
    with pytest.raises(EyasError, match=r"reads last_hidden.*not of every row"):
        make_plan(config(url, tmp_path / "run"))


def test_settings_of_another_kind_are_refused(url):
    with pytest.raises(ValueError, match="layers=2 has no meaning with kind=medusa"):
        config(url, "unused", layers=2)
    with pytest.raises(ValueError, match=r"dropout=0.5 has no meaning with kind=eagle3.*give kind=medusa"):
        config(url, "unused", kind="eagle3", dropout=0.5)


def test_settings_of_one_name_are_one_option():
    """What a second kind, or all kinds, mean by a name is not silently another thing."""
    require_apart(KINDS, TrainConfig)

    @dataclass(frozen=True, kw_only=True)
    class Other:
        layers: int = setting(4, "Layers.", least=1)

    @dataclass(frozen=True, kw_only=True)
    class Noisy:
        noise: float = setting(0.1, "Noise.", least=0)

    with pytest.raises(ValueError, match="layers of kind=other is one option with that of kind=eagle3"):
        require_apart(KINDS | {"other": Other}, TrainConfig)
    with pytest.raises(ValueError, match="noise of kind=noisy is a setting of all kinds"):
        require_apart(KINDS | {"noisy": Noisy}, TrainConfig)


def test_a_recipes_settings_of_another_kind_are_left_out():
    recipe = {"layers": 2, "blocks": 3, "warmup": 0.1, "draft_vocab": 32_000}
    assert beneath(recipe, {"kind": "medusa"}) == {"kind": "medusa", "blocks": 3, "warmup": 0.1}
    assert beneath(recipe | {"kind": "medusa"}, {"seed": 1}) == recipe | {"kind": "medusa", "seed": 1}
    assert beneath(recipe, {"kind": ["medusa"]}) == recipe | {"kind": ["medusa"]}  # whose check refuses it


def test_what_a_kind_has_chosen_of_training_alone_is_of_a_runs_identity(url, monkeypatch):
    """A run is not continued with another value of what the head itself does not tell."""

    @dataclass(frozen=True, kw_only=True)
    class Settings(medusa.Settings):
        warming: float = setting(0.5, "Something of training.", least=0)

    @dataclass(frozen=True)
    class Config(medusa.Config, Settings):
        pass

    class Warmed(medusa.Medusa):
        @classmethod
        def for_target(cls, target, draft_vocab_size, aux_layers, warming, **settings):
            return super().for_target(target, draft_vocab_size, aux_layers, **settings)

    monkeypatch.setitem(KINDS, "medusa", Settings)
    monkeypatch.setitem(HEADS, "medusa", Warmed)
    some, other = (
        make_plan(Config(url, "unused", draft_vocab=48, init="target", warming=x)) for x in (0.5, 1)
    )
    assert differences(some.identity, other.identity) == ["config.warming: 0.5 there, 1.0 here"]


def test_what_is_not_exact_in_bfloat16_is_read_as_it_is_stored(url):
    """The last state of a head that reads nothing else."""
    plan = make_plan(config(url, "unused"))
    (((_, batch), *_), *_) = Stream(plan.store, plan.mesh, [plan.view]).batches()
    found = plan.head.inputs.of(batch.aux_hidden, batch.last_hidden)
    np.testing.assert_array_equal(
        found[:, :, 0], plan.store.read(("last_hidden",), plan.order.rows[0])["last_hidden"]
    )


@pytest.mark.parametrize(("usual", "size"), [(None, small_store.V), (16, 16), (99, small_store.V)])
def test_a_kinds_draft_vocabulary_is_the_usual_one_unless_another_is_asked_for(url, monkeypatch, usual, size):
    """Heads whose output is the target's own have all of its tokens."""
    monkeypatch.setattr(medusa.Medusa, "draft_vocab", usual)
    assert make_plan(config(url, "unused", draft_vocab=None)).head.draft_vocab_size == size
    assert make_plan(config(url, "unused", draft_vocab=20)).head.draft_vocab_size == 20


def test_weights_that_stay_need_no_room_for_moments(url):
    """The output of a whole vocabulary is most of a head that does not train it."""
    plans = {x: make_plan(config(url, "unused", kind="eagle3", lm_head=x)) for x in ("own", "frozen")}
    own, frozen = (room(plan.config, plan.head) for plan in plans.values())
    assert own - frozen == 3 * 8 * 48 * small_store.H


def test_every_kind_of_head_can_be_chosen_with_its_own_settings():
    (choices,) = (knob.setting.choices for knob in knobs(medusa.Config) if knob.name == "kind")
    assert set(choices) == HEADS.keys() == KINDS.keys()
    known = [knob.name for knob in knobs(medusa.Config)]
    assert len(known) == len(set(known))
    for settings in KINDS.values():
        assert {knob.name for knob in knobs(settings)} <= set(known)


ODD = ("a", -1, 1.5, None, [2**70], {}, 2**31, 10**30)
GONE = object()
SLOW = ("eagle3", *kinds.ALL)


def refused(read: Callable[[], Any]) -> bool:
    """Whether it is; nothing but an EyasError of one line is a refusal."""
    said = ""
    try:
        read()
    except EyasError as error:
        said = str(error)
    assert "\n" not in said
    return bool(said)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["medusa", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)])
def test_whatever_a_field_of_a_config_json_holds_is_one_line_or_does_not_matter(
    url, tmp_path, kind, monkeypatch
):
    """Also numbers that would be looped over for hours."""
    folder, target, store = f"{tmp_path}/head", small_store.TARGET, Store.open(url)
    kinds.register(monkeypatch)
    settings = {knob.name: knob.default for knob in knobs(KINDS[kind])}
    head = HEADS[kind].for_target(target, 48, small_store.AUX_LAYERS, **settings)
    export(folder, initialise(head.parameters(), jax.random.key(0)), head, np.arange(48), target)
    place = f"{folder}/config.json"
    whole = storage.read_json(place)
    reads = (lambda: load_head(folder, target)), (lambda: open_published(folder, kind, store))
    assert [refused(read) for read in reads] == [False, False]
    for name in whole:
        found = []
        for odd in (GONE, *ODD):
            changed = {key: x for key, x in whole.items() if key != name}
            storage.write_json(place, changed if odd is GONE else changed | {name: odd})
            found += [refused(read) for read in reads]
        assert any(found), name
