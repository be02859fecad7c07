"""A recipe is one TOML file for a target: where its weights are, and how it is prepared, dumped and trained.

Sections [prepare], [dump] and [train] hold fields of those stages' configurations, besides `slice`, the TPU
slice that [dump] and [train] are laid out for. A field given on the command line wins over the recipe's, and
the recipe's over the configuration's own default.
"""

import difflib
import os
import re
import time
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from typing import Any

from common import storage
from common.config import knobs
from common.errors import EyasError, RestartError
from common.library_errors import explained, is_librarys, reason
from common.progress import note
from common.texts import printable
from dump.config import DumpConfig, PrepareConfig
from train.config import TrainConfig
from train.heads import KINDS, settings_of

EMBEDDED = "embedded"
_CONFIGS = {"prepare": PrepareConfig, "dump": DumpConfig, "train": TrainConfig}
STAGES = tuple(_CONFIGS)
_ABANDONED = 600  # seconds without a byte after which a part of a file is nobody's
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FOLDER = resources.files("pipelines") / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One target. `model` is a Hub id or "embedded"; sizes are those of its config.json, `quantised` whether
    that tells of quantised weights.

    `prepare`, `dump` and `train` are fields of the stages' configurations by name; `dump_slice` and
    `train_slice` name TPU slices (v6e-16), or "cpu".
    """

    name: str
    model: str
    architecture: str
    layers: int
    hidden_size: int
    vocab_size: int
    dump_slice: str
    train_slice: str
    quantised: bool = False
    prepare: dict[str, Any] = field(default_factory=dict)
    dump: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("model", str), ("architecture", str), *((n, int) for n in _SIZES)):
            value = getattr(self, name)
            if not isinstance(value, kind) or not value:
                raise ValueError(f"{name}={value!r} must be a {kind.__name__}, and not empty")
        if not isinstance(self.quantised, bool):
            raise ValueError(f"quantised={self.quantised!r} must be true or false")
        for stage in ("dump", "train"):
            part, slice_name = getattr(self, stage), getattr(self, f"{stage}_slice")
            other = "tp" if stage == "dump" else "sp"
            used = part.get("dp", 1) * part.get(other, 1)
            if used != chips(slice_name):
                raise ValueError(
                    f"[{stage}] dp*{other}={used} must be the number of chips of slice={slice_name!r}"
                )


_SIZES = ("layers", "hidden_size", "vocab_size")


def chips(slice_name: str) -> int:
    """The chips of a slice by its cloud name, 1 of `cpu`. ValueError for others.

    v6e-16 has 16; the names of v4 and v5p count cores, two a chip: v5p-32 has 16.
    """
    found = re.fullmatch(r"(v6e|v5e|v5p|v4)-(\d+)", slice_name)
    if slice_name != "cpu" and not found:
        raise ValueError(f"slice={slice_name!r} is unknown; write cpu or, say, v6e-16")
    return int(found[2]) // (2 if found[1] in ("v5p", "v4") else 1) if found else 1


def require_known(found: Iterable[str], known: Iterable[str], where: str) -> None:
    """EyasError names the first of the names that is not known, and the one that may be meant."""
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise EyasError(f"{where}: {printable(name)} is unknown; {advice}")


def names() -> list[str]:
    """The known recipes, sorted."""
    return sorted(
        file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml")
    )


def load(name: str) -> Recipe:
    """The recipe of that name. EyasError, listing those there are, if it is unknown."""
    if name not in names():
        raise EyasError(
            f"MODEL {name!r} is no folder and no recipe; give a Hugging Face folder, a Hub id (owner/name) "
            f"or one of {', '.join(names())}"
        )
    return parse(name, (_FOLDER / f"{name}.toml").read_bytes())


def parse(name: str, data: bytes) -> Recipe:
    """The recipe of a TOML file's bytes. EyasError names the field that is wrong."""
    try:
        raw = tomllib.loads(data.decode())
        stages = {stage: dict(raw.pop(stage, {})) for stage in STAGES}
        slices = {f"{stage}_slice": stages[stage].pop("slice", "cpu") for stage in ("dump", "train")}
        require_known(raw, [known.name for known in fields(Recipe)], f"recipe {name}.toml")
        for stage, config in _CONFIGS.items():
            known = [knob.name for knob in knobs(config)]
            require_known(stages[stage], known, f"recipe {name}.toml, [{stage}]")
        return Recipe(name=name, **raw, **stages, **slices)
    except (ValueError, TypeError) as error:  # those of TOML and of Unicode are ValueErrors
        raise EyasError(f"recipe {name}.toml: {error}") from None


def named(model: str) -> Recipe | None:
    """The recipe that MODEL names; None where MODEL is a folder, a URL or a Hub id."""
    return None if "/" in model or os.path.isdir(model) else load(model)


def find(model: str, cache: str) -> Recipe | None:
    """The recipe that MODEL names, or that is for what a folder, a URL or a Hub id has in its config.json."""
    if recipe := named(model):
        return recipe
    place = storage.join(folder(model, cache, weights=False), "config.json")
    return of_target(storage.read_object(place), model) if storage.exists(place) else None


def of_target(config: dict[str, Any], what: str) -> Recipe | None:
    """The recipe for targets with such a config.json; None if there is none.

    It is laid out for their sizes and for weights that are as large; of several such, whose settings are the
    same, one. Says so, of `what`.
    """
    inner = config.get("text_config")
    sizes = config | (inner if isinstance(inner, dict) else {})
    for recipe in map(load, names()):
        same = (
            config.get("architectures") == [recipe.architecture]
            and sizes.get("num_hidden_layers") == recipe.layers
            and sizes.get("hidden_size") == recipe.hidden_size
            and sizes.get("vocab_size", recipe.vocab_size) == recipe.vocab_size  # Gemma's files leave it out
            and bool(sizes.get("quantization_config")) == recipe.quantised
        )
        if same:
            note(f"{what} has the sizes of the recipe {recipe.name}: its settings hold where none is given")
            return recipe
    return None


def beneath(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stage: what was given, over the recipe's.

    A learning rate is one optimiser's. With another one, its own default holds where no rate is given. What
    is chosen about a kind of head, and the size of its draft vocabulary, is left out with another one.
    """
    rest, kind = dict(recipe), recipe.get("kind", TrainConfig.kind)
    asked = given.get("kind", kind)
    if isinstance(asked, str) and asked in KINDS and asked != kind:
        for name in {"draft_vocab", *settings_of(kind)} - {*settings_of(asked)}:
            rest.pop(name, None)
    if given.get("optimizer", recipe.get("optimizer")) != recipe.get("optimizer"):
        rest.pop("learning_rate", None)
    return rest | given


def folder(model: str, cache: str, weights: bool = True) -> str:
    """The model folder (or URL) of MODEL: a recipe, a folder, a URL or a Hub id, fetched into `cache`.

    Without `weights` it may lack those, so that what it is can be looked at first. EyasError if it is none of
    them or cannot be fetched.
    """
    recipe = named(model)
    if recipe is not None and recipe.model == EMBEDDED:
        from pipelines import embedded

        return embedded.fetch_model(cache)
    source = recipe.model if recipe else model
    if "://" in source or os.path.isdir(source) or not _HUB_ID.fullmatch(source):
        return source  # the stage says what is wrong with a folder that is not there
    return _from_hub(source, cache, weights)


def _from_hub(model: str, cache: str, weights: bool) -> str:
    """A Hub repository's weights, configuration and tokenizer.

    A broken connection continues where it broke, and a stopped or killed fetch with the files that are
    missing. EyasError in one line for anything that goes wrong.
    """
    import huggingface_hub

    wanted = ["*.json", "*.jinja", "tokenizer.model", "*.txt"] + ["*.safetensors"] * weights
    place = os.path.join(cache, "hub", *model.split("/"))
    _remove_abandoned(place)
    try:
        return huggingface_hub.snapshot_download(model, local_dir=place, allow_patterns=wanted)
    except Exception as error:
        # Its client's transfers in Rust raise RuntimeErrors.
        if not (is_librarys(error) or isinstance(error, OSError | ValueError | RuntimeError)):
            raise
        kind, system = type(explained(error, model)), getattr(error, "errno", None)  # a full disk, say
        raise (kind if issubclass(kind, RestartError) or system else EyasError)(
            f"{model} is no folder here and could not be fetched from the Hub ({reason(error)}); check the "
            "name and the network, and log in if the model is gated"
        ) from None


def _remove_abandoned(place: str) -> None:
    """Removes parts of files that a killed fetch left behind: nothing continues them, and they are large."""
    for folder, _, found in os.walk(os.path.join(place, ".cache")):
        for path in (os.path.join(folder, name) for name in found if name.endswith(".incomplete")):
            if time.time() - os.path.getmtime(path) > _ABANDONED:
                os.unlink(path)


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON."""
    return asdict(recipe)
