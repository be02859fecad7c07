"""Reads an exported head back and says whether the servers will load it, and as what it was trained to be."""

from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from common import params as declared
from common.errors import EyasError
from common.safetensors import PICKLES
from common.storage import as_local, join, list_names, read_json
from train import servers
from train.draft_maps import check_maps
from train.export import WEIGHTS
from train.heads.head import Head, read_serving_config
from train.names import EXPERIMENT

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def check(
    folder: str, target_config: dict[str, Any] | None = None, wanted: tuple[str, ...] = ()
) -> list[str]:
    """What was found, a line each; EyasError, in one line, for the first thing a server would stumble over.

    Compares names, shapes, dtypes and values of the tensors with config.json, d2t with t2d, and, when the
    target's config.json is given, sizes, RoPE and aux layers with the target's. Says of each server what it
    makes of the folder; EyasError if one of the servers `wanted`, keys of servers.SERVERS, cannot take it.
    """
    _check_files(folder)
    path = join(folder, "config.json")
    config = read_json(path)
    # Without its target only the number of default layers matters; 7 is the smallest target that has them.
    head = read_serving_config(path, config, (target_config or {}).get("num_hidden_layers", 7))
    if target_config is not None:
        head.require_fit(target_config, folder)
    layout = head.layout_of(config)
    assert layout is not None
    facts = [*_check_weights(folder, head, layout, config["torch_dtype"]), *head.facts()]
    if target_config is not None:
        facts.append("target: the head fits it")
    found = servers.verdicts(head.limits(target_config or {}), layout)
    servers.require(found, wanted, folder)
    return [*facts, f"layout {layout}:", *(f"  {line}" for line in servers.table(found))]


def _check_files(folder: str) -> None:
    names = list_names(folder)
    if EXPERIMENT in names:
        raise EyasError(f"{folder} is a run, which holds heads; name {folder.rstrip('/')}/best, or last")
    for name in names:
        if name.endswith(PICKLES):
            raise EyasError(
                f"{folder} holds {name}, a pickle that some servers run in place of {WEIGHTS}; remove it"
            )
        if name.endswith(".py"):
            raise EyasError(f"{folder} holds {name}, code that a server may run; remove it")
        if name.endswith(".safetensors") and name != WEIGHTS:
            raise EyasError(f"{folder} holds {name} beside {WEIGHTS}, and servers load both; remove it")


def _check_weights(folder: str, head: Head, layout: str, dtype: str) -> list[str]:
    path = join(folder, WEIGHTS)
    declared_as, beside = head.parameters(), head.beside(layout)
    expected = {name: declared_as[source] for name, source in head.tensors(layout).items()}
    types = dict.fromkeys(expected, (_DTYPES[dtype],)) | dict.fromkeys(beside, tuple(_DTYPES.values()))
    types |= {"d2t": ("I64",), "t2d": ("BOOL",)}
    N, V = head.draft_vocab_size, head.vocab_size
    try:
        with as_local(path) as local, safe_open(local, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            found = {name: SimpleNamespace(shape=s.get_shape()) for name, s in slices.items()}
            declared.check(expected | beside, found, f"{path}, beside its config.json,")
            for name, s in slices.items():
                if s.get_dtype() not in types[name]:
                    raise EyasError(
                        f"{path}: {name} is {s.get_dtype()}, expected {types[name][0]}; export it again"
                    )
                if not np.isfinite(file.get_tensor(name)).all():
                    raise EyasError(
                        f"{path}: {name} has values that are not finite; export another checkpoint"
                    )
            _check_copies(path, file, head.tensors(layout))
            if "d2t" in beside:
                check_maps(path, file.get_tensor("d2t"), file.get_tensor("t2d"), V)
    except FileNotFoundError:
        raise EyasError(f"{path} is missing; check the path") from None
    except SafetensorError as error:
        raise EyasError(f"{path} cannot be read ({error}); copy or export it again") from error
    count = sum(int(np.prod(p.shape)) for p in head.parameters().values())
    return [
        f"{WEIGHTS}: {len(expected | beside)} tensors, {count:,} parameters, {dtype}, all finite",
        f"draft vocabulary: {N:,} of {V:,} tokens" + (", d2t and t2d agree" if "d2t" in beside else ""),
    ]


def _check_copies(path: str, file: Any, sources: dict[str, str]) -> None:
    """EyasError unless tensors that servers find under two names are the same under both."""
    first: dict[str, str] = {}
    for name, source in sources.items():
        same = first.setdefault(source, name)
        if same != name and not np.array_equal(file.get_tensor(name), file.get_tensor(same)):
            raise EyasError(f"{path}: {name} is not {same}, as which servers read it; export it again")
