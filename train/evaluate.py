"""A head on the held-out rows, offline from the store, beside predictors that anyone could build.

Dimensions: B rows a batch, T positions, K steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common import storage
from common.errors import EyasError
from common.layers import compute_dtype
from common.mesh import make_mesh, sharding
from common.progress import Progress, note
from common.safetensors import Checkpoint
from common.store import Store
from train import check_export, ngram
from train.batch import Frozen, Params
from train.config import EvaluateConfig
from train.heads import Head, read_serving_config
from train.metrics import Sums, add, summarise
from train.plan import frozen
from train.step import score_step
from train.stream import Stream, Workload


class Evaluator:
    """Scores heads of one shape on fixed rows; compiles once."""

    def __init__(
        self,
        store: Store,
        rows: np.ndarray,
        head: Head,
        draft_ids: np.ndarray,
        mesh: Mesh,
        ttt_steps: int,
        batch_rows: int,
        dtype: Any,
        teacher: str = "recompute",
        answer_tokens: int | None = None,
    ):
        size = max(mesh.size, min(batch_rows, -(-len(rows) // mesh.size) * mesh.size))
        filled = np.full(-(-len(rows) // size) * size, -1, np.int64)
        filled[: len(rows)] = rows
        self._batches = filled.reshape(-1, size)
        self._tokens = size * store.length
        # The default mask, whatever the training's was: figures of different runs compare.
        workload = Workload(store, rows, ttt_steps)
        self.counted = workload.counted
        capacity = workload.capacity(np.maximum(self._batches, rows[0]), mesh.size)
        self._stream = Stream(store, workload, capacity, mesh, teacher, draft_ids)
        self._score: Callable = jax.jit(score_step(head, mesh, ttt_steps, dtype, answer_tokens))

    def __call__(self, params: Params, taught: Frozen, label: str = "evaluate") -> dict[str, Any]:
        """The metrics of train/metrics.py."""
        sums: Sums | None = None
        with Progress(label, len(self._batches) * self._tokens, "tok") as progress:
            for batch in self._stream.batches(self._batches):
                sums = add(sums, self._score(params, taught, batch))
                progress.update(self._tokens)
        return summarise(sums)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """{"head", "unigram", "bigram": metrics, "rows", "store"}.

    EyasError for a head that is not sound or not this store's target's, a store that is partial, and one
    without test rows.
    """
    store = Store.open(config.store)
    store.require_complete()
    rows = store.split_rows("test")
    if not len(rows):
        raise EyasError(f"{config.store} has no held-out rows; prepare a store with holdout above 0")
    head, params, draft_ids = load_head(config.head, store)
    mesh = make_mesh(config.dp)
    dtype = jnp.dtype(compute_dtype(config.dtype))
    note(f"evaluate: {config.head} on {len(rows)} held-out rows of {store.length} tokens")
    shape = (store, rows, head, draft_ids, mesh, config.ttt_steps, config.batch_rows, dtype)
    evaluator = Evaluator(*shape, answer_tokens=config.answer_tokens)
    if not evaluator.counted:
        raise EyasError(f"{config.store}: no position of its {len(rows)} test rows is counted; hold out more")
    taught = frozen(store, draft_ids, "recompute", mesh, dtype)
    found = {"head": evaluator(jax.device_put(params, sharding(mesh, ())), taught)}
    if config.ngrams:
        found |= ngram.evaluate(store, config.ttt_steps, config.answer_tokens)
    return found | {"rows": len(rows), "store": store.hash}


def load_head(folder: str, store: Store) -> tuple[Head, Params, np.ndarray]:
    """(config, float32 parameters, draft ids) of a folder that `train.export` wrote, checked."""
    target = store.target_config()
    check_export.check(folder, target)
    place = storage.join(folder, "config.json")
    head = read_serving_config(place, storage.read_json(place), target["num_hidden_layers"])
    if list(head.aux_layers) != store.features["aux_layers"]:
        raise EyasError(
            f"{folder} takes aux layers {list(head.aux_layers)}, {store.url} has those of "
            f"{store.features['aux_layers']}; dump a store with --aux-layers like the head's"
        )
    tensors = Checkpoint.open(folder)
    params = {name: tensors.read(name).astype(np.float32) for name in head.parameters()}
    ids = np.arange(head.draft_vocab_size)
    if "d2t" in tensors.tensors:
        ids = ids + tensors.read("d2t")
    return head, params, ids.astype(np.int32)
