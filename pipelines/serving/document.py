"""The lists of SERVING.md: which server takes which kind of head, and the commands of every recipe.

    python -m pipelines.serving.document

writes them anew between the marks of the file; a test compares them.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.aux_layers import default_aux_layers
from dump import target
from pipelines import recipes
from pipelines.bench.published import PUBLISHED
from train import launch
from train.config import TrainConfig
from train.heads import chosen
from train.heads.head import HEADS
from train.servers import PORTABLE, SERVERS, TPU, Verdict, verdicts

FILE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "SERVING.md")
_BEGIN, _END = "<!-- made by pipelines/serving/document.py: {} -->", "<!-- end: {} -->"
_MEMORY = {"vllm": 80e9, "sglang": 80e9, "tpu-inference": 32e9, "sglang-jax": 32e9}  # bytes: H100, v6e
_FOR_WEIGHTS = 0.7  # of a chip's memory; the rest is for caches and the head


def kinds() -> str:
    """A table of kinds of heads, for a Llama of 32 layers, and servers."""
    llama = PUBLISHED["llama-3.1-8b"]
    llama = llama | {"rope_scaling": None, "rope_parameters": None}  # of which a line below tells
    servers = list(SERVERS)
    lines = ["| | " + " | ".join(f"{s.title} {s.version}" for s in SERVERS.values()) + " |"]
    lines.append("|---" * (1 + len(servers)) + "|")
    default = default_aux_layers(llama["num_hidden_layers"])
    for name, kind in HEADS.items():
        for words, its in kind.variants.items():
            given = (
                {"draft_vocab_size": kind.draft_vocab or llama["vocab_size"], "aux_layers": default}
                | chosen(name, {})
                | its
            )
            limits = kind.for_target(llama, **given).limits(llama)
            found = [verdicts(limits, SERVERS[server].layouts[0])[server] for server in servers]
            lines.append(f"| {words} | " + " | ".join(map(_word, found)) + " |")
    return "\n".join(lines)


def _word(verdict: Verdict) -> str:
    if not verdict.taken:
        return "no"
    return "vLLM's models" if verdict.environment else "yes"


def commands() -> str:
    """The commands of every recipe."""
    return "\n\n".join(_of_recipe(recipes.load(name)) for name in recipes.names())


def _of_recipe(recipe: recipes.Recipe) -> str:
    lines, name = [f"### {recipe.name}", "", "```sh"], recipe.train.get("kind", TrainConfig.kind)
    kind, settings = HEADS[name], chosen(name, recipe.train)
    if recipe.model == recipes.EMBEDDED:
        served = launch.Served(f"heads/{recipe.name}", PORTABLE, kind.method)
        options = launch.command("vllm", ".cache/smollm2-135m", served)
        made = launch.Command((*options.options, *launch.CPU_OPTIONS), launch.CPU)
        return "\n".join([*lines, "# vLLM for CPUs", made.text(), "```"])
    config, size = _published(recipe.name)
    aux = default_aux_layers(recipe.layers)
    head = kind.for_target(
        config, recipe.train.get("draft_vocab", kind.draft_vocab or config["vocab_size"]), aux, **settings
    )
    limits, refused = head.limits(config), []
    for name in _MEMORY:
        found = {layout: verdicts(limits, layout)[name] for layout in SERVERS[name].layouts}
        layout = next((layout for layout, its in found.items() if its.taken and not its.why), PORTABLE)
        if not found[layout].taken:
            refused.append(f"{SERVERS[name].title} cannot take {found[layout].why}.")
            continue
        place = f"heads/{recipe.name}" + (f"-{TPU}" if layout == TPU else "")
        chips = _chips(size, _MEMORY[name])
        served = launch.Served(place, layout, kind.method)
        made = launch.command(name, recipe.model, served, chips=chips, environment=found[layout].environment)
        lines += [f"# {SERVERS[name].title}, {chips} x {_MEMORY[name] / 1e9:.0f} GB", made.text()]
    return "\n".join([*lines, "```", *([""] if refused else []), *refused])


def _published(name: str) -> tuple[dict[str, Any], float]:
    """(what a store would keep of a target's config.json, the bytes of its weights)."""
    with tempfile.TemporaryDirectory(prefix="eyas-") as folder:
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(PUBLISHED[name], file)
        cfg = target.read_config(folder)
    held = target.parameters(cfg, 1, 1).values()
    size = sum(math.prod(p.shape) * np.dtype(p.dtype or np.float16).itemsize for p in held)
    return cfg.text | {"architectures": [cfg.architecture]}, float(size)


def _chips(size: float, memory: float) -> int:
    chips = 1
    while size > _FOR_WEIGHTS * memory * chips:
        chips *= 2
    return chips


def made() -> Iterator[tuple[str, str]]:
    """(the name of a list, its text)"""
    yield "kinds", kinds()
    yield "commands", commands()


def updated(text: str) -> str:
    """The document with its lists as they are now."""
    for name, its in made():
        begin, end = _BEGIN.format(name), _END.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{its}\n{end}{after}"
    return text


if __name__ == "__main__":
    with open(FILE, encoding="utf-8") as file:
        old = file.read()
    with open(FILE, "w", encoding="utf-8") as file:
        file.write(updated(old))
