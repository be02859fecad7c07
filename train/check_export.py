"""Reads an exported head back and says whether the servers will load it, and as what it was trained to be."""

from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from common import params as declared
from common.errors import EyasError
from common.params import Param
from common.storage import as_local, join, list_names, read_json
from train.draft_maps import check_maps
from train.heads import Head, read_serving_config

WEIGHTS = "model.safetensors"

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def check(
    folder: str, target_config: dict[str, Any] | None = None, servers: tuple[str, ...] = ()
) -> list[str]:
    """What was found, a line each; EyasError, in one line, for the first thing a server would stumble over.

    Compares names, shapes, dtypes and values of the tensors with config.json, d2t with t2d, and, when the
    target's config.json is given, sizes, RoPE and aux layers with the target's. A line that says `cannot`
    names servers that do not take such a head; it is an EyasError where it is one of `servers`, keys of
    serving_config.SERVERS.
    """
    _check_files(folder)
    path = join(folder, "config.json")
    config = read_json(path)
    # Without its target only the number of default layers matters; 7 is the smallest target that has them.
    head = read_serving_config(path, config, (target_config or {}).get("num_hidden_layers", 7))
    if target_config is not None:
        head.require_fit(target_config, folder)
    facts = [*_check_weights(folder, head, config["torch_dtype"]), *head.facts()]
    if target_config is not None:
        facts.append("target: hidden size, vocabulary, RoPE and aux layers fit")
    for limit in head.limits():
        if wanted := [name for name in limit.servers if name in servers]:
            raise EyasError(
                f"{folder}: {limit._replace(servers=tuple(wanted)).sentence()}; train a head without it, "
                "or serve it elsewhere"
            )
    return facts + [limit.sentence() for limit in head.limits()]


def _check_files(folder: str) -> None:
    for name in list_names(folder):
        if name.endswith(_PICKLES):
            raise EyasError(
                f"{folder} holds {name}, a pickle that some servers run in place of {WEIGHTS}; remove it"
            )
        if name.endswith(".py"):
            raise EyasError(f"{folder} holds {name}, code that a server may run; remove it")
        if name.endswith(".safetensors") and name != WEIGHTS:
            raise EyasError(f"{folder} holds {name} beside {WEIGHTS}, and servers load both; remove it")


def _check_weights(folder: str, head: Head, dtype: str) -> list[str]:
    path = join(folder, WEIGHTS)
    declared_as = head.parameters()
    expected = {name: declared_as[source] for name, source in head.tensors().items()}
    types = dict.fromkeys(expected, _DTYPES[dtype])
    N, V = head.draft_vocab_size, head.vocab_size
    if N < V:
        expected = expected | {"d2t": Param((N,), (None,)), "t2d": Param((V,), (None,))}
        types |= {"d2t": "I64", "t2d": "BOOL"}
    try:
        with as_local(path) as local, safe_open(local, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            found = {name: SimpleNamespace(shape=s.get_shape()) for name, s in slices.items()}
            declared.check(expected, found, f"{path}, beside its config.json,")
            for name, s in slices.items():
                if s.get_dtype() != types[name]:
                    raise EyasError(
                        f"{path}: {name} is {s.get_dtype()}, expected {types[name]}; export it again"
                    )
                if not np.isfinite(file.get_tensor(name)).all():
                    raise EyasError(
                        f"{path}: {name} has values that are not finite; export another checkpoint"
                    )
            for name, source in head.tensors().items():
                if name != source and not np.array_equal(file.get_tensor(name), file.get_tensor(source)):
                    raise EyasError(
                        f"{path}: {name} is not {source}, as which servers read it; export it again"
                    )
            if N < V:
                check_maps(path, file.get_tensor("d2t"), file.get_tensor("t2d"), V)
    except FileNotFoundError:
        raise EyasError(f"{path} is missing; check the path") from None
    except SafetensorError as error:
        raise EyasError(f"{path} cannot be read ({error}); copy or export it again") from error
    count = sum(int(np.prod(p.shape)) for p in head.parameters().values())
    return [
        f"{WEIGHTS}: {len(expected)} tensors, {count:,} parameters, {dtype}, all finite",
        f"draft vocabulary: {N:,} of {V:,} tokens" + (", d2t and t2d agree" if N < V else ""),
    ]
