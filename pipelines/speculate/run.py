"""The whole of speculate: prompts are answered by the target alone and with drafts, set by set."""

import itertools
from collections.abc import Container
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from common.config import to_json
from common.device_errors import device_errors
from common.errors import EyasError
from common.layers import compute_dtype
from common.progress import Progress, note
from common.texts import without_secrets
from dump import target
from dump.chat import Chat
from dump.target import decoding
from pipelines import figures
from pipelines.decoding.drafting import Drafter, Drafting
from pipelines.decoding.engine import Engine, on_one_device, require_length
from pipelines.decoding.sampling import Sampling
from pipelines.speculate.config import SpeculateConfig
from pipelines.speculate.measure import Figures, measure
from pipelines.speculate.prompts import PromptSet, of_file, of_store
from train import evaluate
from train.config import EvaluateConfig
from train.source import Source

# What figures of eval begin with.
_ESTIMATED = ("rows", "drafts", "own_text", "length_", "accepted_", "sampled_")


@device_errors("give fewer --slots or --draft-tokens, or a smaller --length")
def run(config: SpeculateConfig) -> dict[str, Any]:
    """{"settings", "sets": {name: figures with "categories" and "left_out"}, "estimate": eval's of a store};
    also written to `config.out`.

    EyasError for a head that is not sound or not the target's, a tree on a target that cannot read one, and
    prompts that cannot be read.
    """
    cfg = target.read_config(config.model)
    require_length(cfg, config.model, config.length)
    if config.eagle_topk > 1:
        decoding.require_trees(cfg)
    target.check(config.model, cfg)
    chat = Chat.load(config.model)
    head = evaluate.load_head(config.head, cfg.text)
    if config.eagle_topk > (words := head[0].draft_vocab_size):
        raise EyasError(
            f"eagle_topk={config.eagle_topk}, but the draft vocabulary of {config.head} has {words} tokens"
        )
    head[0].require_steps(config.steps, config.head)
    read = (config.model, config.head, *([config.store] if config.store else []))
    figures.require_place(config.out, config.prompts or (), read)
    source = Source(config.store) if config.store else None
    sets = [] if source is None else [_held_out(config, source)]
    most = config.max_tokens, config.length, config.each
    sets += [of_file(path, chat, *most) for path in config.prompts or ()]
    found: dict[str, Any] = {"settings": _settings(config)}
    if source is not None:
        found["estimate"] = _estimate(config, source)
    drafting, plain = engines(config, cfg, head)
    found["sets"] = {}
    for one in sets:
        found["sets"][_unused(one.name, found["sets"])] = _of_set(config, drafting, plain, chat.stops, one)
    found["compiling_s"] = round(sum(engine.compiling for engine in (drafting, plain) if engine), 1)
    figures.write(config.out, found)
    return found


def _unused(name: str, others: Container[str]) -> str:
    """The name, or the name and a number."""
    names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
    return next(one for one in names if one not in others)


def _settings(config: SpeculateConfig) -> dict[str, Any]:
    prompts = config.prompts and tuple(map(without_secrets, config.prompts))
    return to_json(replace(config, prompts=prompts)) | {"nodes": config.nodes}


def _held_out(config: SpeculateConfig, source: Source) -> PromptSet:
    rows = evaluate.some(source.test_rows, config.each)
    return of_store(source.store, rows, config.max_tokens, config.length)


def _estimate(config: SpeculateConfig, source: Source) -> dict[str, Any]:
    """What the walk through the same rows says of a chain."""
    walked = EvaluateConfig(
        config.head, config.store, config.steps, answer_tokens=config.max_tokens, dtype=config.dtype
    )
    found = evaluate.estimate(source, walked, config.each)
    return {name: x for name, x in found.items() if name.startswith(_ESTIMATED)}


def engines(config: SpeculateConfig, cfg: target.TargetConfig, loaded: Any) -> tuple[Engine, Engine | None]:
    """(with drafts, without)"""
    head, params, ids = loaded
    weights = on_one_device(config.model, cfg, compute_dtype(config.dtype))
    dtype = weights["norm"].dtype
    params = {name: jnp.asarray(x) for name, x in params.items()}
    ready, output = jax.jit(lambda x: (head.ready(x, dtype), head.output(x).astype(dtype)))(params)
    sampling = Sampling(config.temperature, config.top_p, config.top_k)
    how = cfg, weights, config.slots, config.length, sampling
    shape = Drafting(head, config.steps, config.nodes, config.eagle_topk, config.sampled_drafts)
    drafting = Engine(*how, shape, Drafter(ready, output, jnp.asarray(ids)))
    note(f"speculate: {config.model} with {config.head}; programs are compiled when they are first needed")
    return drafting, Engine(*how) if config.plain else None


def _of_set(
    config: SpeculateConfig, drafting: Engine, plain: Engine | None, stops: frozenset[int], one: PromptSet
) -> dict[str, Any]:
    """The figures of a set and of its categories, each of which is answered by itself."""
    total, categories = Figures(config.steps), {}
    comparable = plain is not None and not config.sampled_drafts
    with Progress(f"speculate {one.name}", None, " tokens") as bar:
        for category, prompts in one.categories().items():
            asked = stops, prompts, config.steps, config.seed, comparable, bar.update
            measured = measure(drafting, plain, *asked)
            total += measured
            categories[category] = measured.summary()
    named = {} if len(categories) == 1 else {"categories": categories}
    return {"categories": {}} | total.summary() | named | {"left_out": one.left_out}
