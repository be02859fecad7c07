"""A sweep's file: settings that are common, and experiments that differ in some of them.

[settings]                  # fields of `eyas train`, over the recipe's
steps = 2000
[[experiments]]             # one head each, under its name
name = "more-steps"
ttt_steps = 9
[grid]                      # and one head for every combination of these
learning_rate = [1e-4, 2e-4]
seed = [0, 1, 2]
"""

import itertools
import math
import os
import re
import tomllib
from typing import Any

from common import storage
from common.config import knobs
from common.errors import EyasError
from common.texts import printable
from pipelines.recipes import beneath, require_known
from train.config import TrainConfig
from train.names import EXPERIMENT

ONE_STREAM = ("batch_rows", "data_seed", "dp", "sp", "cache", "memory")  # what is the stream's, and so common
_PARTS = ("settings", "experiments", "grid")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]{0,99}")
_FILES = (EXPERIMENT, "compare.html", "compare.png", "compare.svg")  # which lie beside the heads
_MOST = 1000  # experiments


def read(url: str, store: str, out: str, recipe: dict[str, Any]) -> dict[str, TrainConfig]:
    """{name: its training} of the file; `recipe`'s fields hold where the file says nothing else.

    EyasError names what is wrong with the file, before anything is looked at.
    """
    data = storage.read_bytes(url)
    try:
        raw = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # those of TOML, of Unicode and of very deep lists
        raise EyasError(f"{url} is not TOML: {error}") from None
    known = [knob.name for knob in knobs(TrainConfig)]
    require_known(raw, _PARTS, url)
    settings = _table(raw, "settings", url)
    require_known(settings, known, f"{url}, [settings]")
    found: dict[str, TrainConfig] = {}
    for name, own in [*_listed(raw, known, url), *_grid(raw, known, url)]:
        where = f"{url}, experiment {name}"
        if name in found:
            raise EyasError(f"{where}: two have this name; each has a folder of its own, so rename one")
        if name in _FILES:
            raise EyasError(f"{where}: a file of that name lies beside the heads' folders; rename it")
        for key in ONE_STREAM:
            if key in own:
                raise EyasError(f"{where}: {key} is of the stream that all share; move it to [settings]")
        place = {"store": store, "out": f"{out.rstrip('/')}/{name}"}
        try:
            found[name] = TrainConfig(**beneath(recipe, settings | own | place))
        except ValueError as error:
            raise EyasError(f"{where}: {error}") from None
    if not found:
        raise EyasError(f"{url} has no experiments; add [[experiments]] with a name, or a [grid]")
    _require_few(len(found), url)
    return found


def _require_few(count: int, url: str) -> None:
    if count > _MOST:
        raise EyasError(f"{url} has {count:,} experiments, more than {_MOST:,}; divide it")


def _table(raw: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = raw.get(name, {})
    if not isinstance(value, dict):
        raise EyasError(f"{where}: {name} must be a table; write [{name}]")
    return value


def _listed(raw: dict[str, Any], known: list[str], where: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of every [[experiments]]."""
    value = raw.get("experiments", [])
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise EyasError(f"{where}: experiments must be tables of a list; write [[experiments]] above each")
    found = []
    for number, one in enumerate(value, 1):
        at = f"{where}, experiment {printable(str(one.get('name', number)))}"
        require_known(one, ["name", *known], at)
        name = one.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise EyasError(
                f"{at}: name={name!r} must be text that can be a folder: letters, digits and _ . , = + -, "
                "not beginning with a sign"
            )
        found.append((name, {key: x for key, x in one.items() if key != "name"}))
    return found


def _grid(raw: dict[str, Any], known: list[str], where: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of every combination in [grid]: "learning_rate=0.0001,seed=2"."""
    grid = _table(raw, "grid", where)
    require_known(grid, known, f"{where}, [grid]")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise EyasError(f"{where}, [grid]: {key} must be a list of values")
    _require_few(math.prod(map(len, grid.values())), where)  # before all of them are written out
    names = [[(key, x, f"{key}={_word(x)}") for x in values] for key, values in grid.items()]
    found = []
    for combination in itertools.product(*names) if names else ():
        name = ",".join(word for _, _, word in combination)
        if not _NAME.fullmatch(name):
            raise EyasError(
                f"{where}, [grid]: {printable(name)} cannot be a folder's name; write it under "
                "[[experiments]] with one"
            )
        found.append((name, {key: x for key, x, _ in combination}))
    return found


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return "+".join(map(_word, value)) if isinstance(value, list) else str(value)


def default_out(url: str) -> str:
    """Where the heads of a file go unless it is said: runs/NAME of NAME.toml."""
    return f"runs/{os.path.splitext(os.path.basename(url))[0]}"
