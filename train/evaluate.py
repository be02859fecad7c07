"""A head on the held-out rows, offline from the store, beside predictors that anyone could build.

Dimensions: B rows a batch, T positions, K steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import pod, storage
from common.device_errors import device_errors
from common.errors import EyasError
from common.folders import read_as_one
from common.layers import compute_dtype
from common.progress import Progress, note
from common.safetensors import Checkpoint
from common.stopping import interruptible
from train import check_export, ngram, pieces, placing
from train.batch import Batch, Frozen, Params
from train.config import EvaluateConfig
from train.draft_maps import read_draft_ids
from train.heads.head import Head, read_serving_config
from train.metrics import Sums, add, summarise
from train.names import AT_MOST
from train.order import each_once, permutation
from train.source import Source
from train.step import score_step
from train.stored import at_most, require_inputs, whole_teacher
from train.stream import Stream, View


def some(rows: np.ndarray, count: int | None) -> np.ndarray:
    """So many of the rows, ascending, the same for whoever asks; None: all."""
    return rows if count is None else np.sort(rows[permutation(len(rows), 0, 0)[:count]])


class Evaluator:
    """Scores heads of one shape on the test rows; compiles once. `rows`: how many; `counted`: the positions
    that count."""

    def __init__(
        self,
        source: Source,
        head: Head,
        draft_ids: np.ndarray,
        ttt_steps: int,
        batch_rows: int,
        dtype: Any,
        answer_tokens: int | None = None,
        count: int | None = None,
    ):
        """`count`: so many of the rows are scored, the same of every head; None: all, in their own order."""
        rows, groups = source.test_rows, source.groups
        size = max(groups, min(batch_rows, -(-len(rows) // groups) * groups))
        rows = some(rows, count)
        wanted = each_once(rows, size)
        # The default mask, whatever the training's was: figures of different runs compare.
        workload = source.workload(ttt_steps, test=True)
        self.source, self.rows, self.counted = source, len(rows), workload.counted(rows)
        capacity = workload.capacity(wanted.rows, groups)
        # The whole teacher, whatever the training's was.
        teacher = whole_teacher(source.store)
        self.view = View(wanted, workload, capacity, teacher, draft_ids, head.inputs)
        self.score: Callable = source.once(
            ("score", repr(head), ttt_steps, str(dtype), answer_tokens),
            lambda: jax.jit(score_step(head, source.mesh, ttt_steps, dtype, answer_tokens)),
        )
        self._is_compiled = False

    def compile(self, params: Params, taught: Frozen, batch: Batch, check: Callable[[], None]) -> None:
        """Has `score` compiled for batches like this one, if that has not been done; `check` may end the
        waiting, which can be minutes."""
        if not self._is_compiled:
            with pod.together():
                interruptible(self.score.lower(params, taught, batch).compile, check)
            self._is_compiled = True

    def __call__(self, params: Params, taught: Frozen, label: str = "evaluate") -> dict[str, Any]:
        """The metrics of train/metrics.py, "rows": of how many, and "sampled_at_most": true where what is
        sampled is a bound (train/stored.py)."""
        return score_all([(self, params, taught)], label)[0]


def score_all(
    heads: Sequence[tuple[Evaluator, Params, Frozen]], label: str, check: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """The metrics of every head, all of one source, from one reading of its test rows. `check` is called at
    every batch and may raise."""
    sums: list[Sums | None] = [None] * len(heads)
    source, (_, B) = heads[0][0].source, heads[0][0].view.order.rows.shape
    stream = Stream(source.store, source.mesh, [evaluator.view for evaluator, _, _ in heads], source.memory)
    reading = stream.reading()
    with Progress(label, len(reading) * B * source.store.length, "tok") as progress:
        for dealt in stream.batches(reading, check=check):
            for number, batch in dealt:
                evaluator, params, taught = heads[number]
                evaluator.compile(params, taught, batch, check)
                sums[number] = add(sums[number], evaluator.score(params, taught, batch))
            progress.update(B * source.store.length)
    evaluators = [evaluator for evaluator, _, _ in heads]
    found = zip(evaluators, sums, strict=True)
    bound = {AT_MOST: True} if at_most(source.store) else {}
    return [{"rows": evaluator.rows} | bound | summarise(one) for evaluator, one in found if one is not None]


@device_errors("give fewer --batch-rows, or more chips (--dp, --sp)")
def run(config: EvaluateConfig) -> dict[str, Any]:
    """{"head", "unigram", "bigram": metrics, "rows", "store"}.

    EyasError for a head that is not sound or not this store's target's, a store that is partial, and one
    without test rows.
    """
    source = Source(config.store, config.dp, config.cache, sp=config.sp)
    found = {"head": estimate(source, config)}
    if config.ngrams:
        found |= ngram.evaluate(source.store, config.ttt_steps, config.answer_tokens)
    return found | {"rows": len(source.test_rows), "store": source.store.hash}


def estimate(source: Source, config: EvaluateConfig, count: int | None = None) -> dict[str, Any]:
    """The metrics of the head on `count` of the held-out rows, None: on all of them. EyasError as `run`."""
    store, rows = source.store, some(source.test_rows, count)
    if not len(rows):
        raise EyasError(f"{config.store} has no held-out rows; prepare a store with holdout above 0")
    head, params, draft_ids = load_head(config.head, store.target_config())
    require_inputs(head.inputs, store, config.head)
    pieces.require(store.length, source.pieces, config.ttt_steps, store.url)
    head.require_pieces(source.pieces, config.head)
    head.require_steps(config.ttt_steps, config.head)
    dtype = jnp.dtype(compute_dtype(config.dtype))
    note(f"evaluate: {config.head} on {len(rows)} held-out rows of {store.length} tokens")
    if bound := at_most(store):
        note(f"evaluate: what is sampled is {bound}")
    shape = (source, head, draft_ids, config.ttt_steps, config.batch_rows, dtype)
    evaluator = Evaluator(*shape, answer_tokens=config.answer_tokens, count=count)
    if not evaluator.counted:
        raise EyasError(f"{config.store}: no position of its {len(rows)} test rows is counted; hold out more")
    taught = source.frozen(draft_ids, whole_teacher(store), dtype)
    where = placing.along(params, head.parameters(), source.mesh)
    return evaluator(jax.tree.map(placing.place, params, where), taught)


def load_head(folder: str, target: dict[str, Any]) -> tuple[Head, dict[str, np.ndarray], np.ndarray]:
    """(head, float32 parameters, draft ids) of a folder that `train.export` wrote, checked against its
    target's config.json. RestartError if it was replaced meanwhile, by a training run say."""
    with read_as_one(folder):
        return _load_head(folder, target)


def _load_head(folder: str, target: dict[str, Any]) -> tuple[Head, dict[str, np.ndarray], np.ndarray]:
    check_export.check(folder, target)
    place = storage.join(folder, "config.json")
    head = read_serving_config(place, storage.read_json(place), target["num_hidden_layers"])
    tensors = Checkpoint.open(folder)
    sources = head.sources(tensors.tensors, folder)
    params = {name: tensors.read(sources[name]).astype(np.float32) for name in head.parameters()}
    return head, params, read_draft_ids(folder, tensors, head)
