"""Everything about a training run that can be known, and refused, before a step is computed.

Dimensions: R train rows, B rows a batch, T positions, V draft vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from common import storage, zarr
from common.config import to_json
from common.draft_vocab import most_frequent
from common.errors import EyasError
from common.layers import compute_dtype
from common.mesh import make_mesh, sharding
from common.params import shapes
from common.storage import require_room
from common.store import Store
from train import optimizer
from train.batch import Frozen, Params
from train.config import TrainConfig
from train.heads import HEADS, Head
from train.init import start
from train.sample import Sample, measure
from train.stream import Stream, Workload, order, teaching_arrays
from train.targets import Capacity

FILE = "experiment.json"
_DRAFT_VOCAB = 32_000
_MOST_ROWS = 2**28  # of a run, repeats counted: their order is held in memory
# A run may be continued with other values of these: they change nothing of the weights, or their rounding,
_FREE = ("out", "log_every", "eval_every", "save_every", "dp")
# or decide on something else that the identity holds.
_RESOLVED = ("epochs", "steps", "draft_vocab", "ffn", "dtype", "store")


@dataclass(frozen=True)
class Plan:
    """A checked run that has not begun. `order` int64 [steps, B] names the rows of every step; `identity` is
    what two runs must share for one to continue the other."""

    config: TrainConfig
    store: Store
    head: Head
    draft_ids: np.ndarray
    mesh: Mesh
    dtype: Any
    order: np.ndarray
    workload: Workload
    capacity: Capacity
    train_rows: np.ndarray
    test_rows: np.ndarray
    eval_every: int
    save_every: int
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        return len(self.order)

    def stream(self) -> Stream:
        """The train split's batches."""
        return Stream(
            self.store, self.workload, self.capacity, self.mesh, self.config.teacher, self.draft_ids
        )

    def shapes(self) -> Any:
        """ShapeDtypeStructs of the head's float32 parameters, on every chip."""
        return shapes(self.head.parameters(), jnp.float32, self.mesh)

    @cached_property
    def sample(self) -> Sample:
        """What the head is told of its target before it trains; read once."""
        c = self.config
        return measure(self.store, self.train_rows, c.seed, self.head.rms_eps, c.init == "fitted")

    def initial(self) -> Params:
        """The untrained head, on every chip."""
        c = self.config
        made = start(self.head, self.store, self.sample, self.draft_ids, c.init, c.seed)
        return jax.device_put(made, sharding(self.mesh, ()))

    def optimizer(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """AdamW, with the head's matrices in its units."""
        c = self.config
        units = self.head.units(self.sample)
        return optimizer.make(rate, c.clip, c.betas, c.weight_decay, units)


def frozen(store: Store, draft_ids: np.ndarray, teacher: str, mesh: Mesh, dtype: Any) -> Frozen:
    """What the head takes from the target, on every chip."""
    embed = store.target_tensor("embed_tokens")
    index = np.full(len(embed), -1, np.int32)
    index[draft_ids] = np.arange(len(draft_ids))
    rows = store.target_tensor("lm_head")[draft_ids].astype(dtype) if teacher == "recompute" else None
    return jax.device_put(Frozen(embed.astype(dtype), rows, index), sharding(mesh, ()))


def make_plan(config: TrainConfig) -> Plan:
    """Checks everything; writes nothing. EyasError names what is wrong."""
    if storage.is_remote(config.out) and not config.out.startswith("gs://"):
        raise EyasError(f"out={config.out} is no local folder nor in a gs:// bucket; name one of those")
    storage.require_folder(config.out)
    store = Store.open(config.store)
    features = store.features
    store.require_complete()
    teaching_arrays(store, config.teacher)
    draft_ids = _draft_ids(config, store, config.teacher)
    aux_layers = tuple(features["aux_layers"])
    head = HEADS["eagle3"].for_target(store.target_config(), len(draft_ids), aux_layers, config.ffn)
    _check_room(config, head)
    mesh = make_mesh(config.dp)
    rows, test_rows = store.split_rows("train"), store.split_rows("test")
    workload = Workload(store, rows, config.ttt_steps, config.compat)
    if not workload.counted:
        raise EyasError(
            f"{config.store} has nothing to learn from: no position of its {len(rows)} train rows predicts "
            "an answer's token; prepare conversations with assistant turns"
        )
    steps = config.steps or max(1, round(config.epochs * len(rows) / config.batch_rows))
    if steps * config.batch_rows > _MOST_ROWS:
        raise EyasError(
            f"{steps} steps of {config.batch_rows} rows are more than {_MOST_ROWS} rows; give fewer "
            "--steps or --epochs"
        )
    wanted = order(rows, config.seed, steps, config.batch_rows)
    dtype = compute_dtype(config.dtype)
    # An evaluation costs about a third of as many training rows; all of them stay below a tenth.
    pace = max(-(-steps // 10), -(-len(test_rows) * 10 // (3 * config.batch_rows)))
    return Plan(
        config=config,
        store=store,
        head=head,
        draft_ids=draft_ids,
        mesh=mesh,
        dtype=jnp.dtype(dtype),
        order=wanted,
        workload=workload,
        capacity=workload.capacity(wanted, mesh.size),
        train_rows=rows,
        test_rows=test_rows,
        eval_every=config.eval_every or pace,
        save_every=config.save_every or -(-steps // 20),
        identity=_identity(config, store, head, draft_ids, steps, dtype),
    )


def _check_room(config: TrainConfig, head: Head) -> None:
    """A new run needs: float32 parameters and moments three times (two kept, one written); two exports."""
    if storage.exists(storage.join(config.out, FILE)):
        return
    count = sum(math.prod(p.shape) for p in head.parameters().values())
    need = 3 * 12 * count + 2 * 2 * count + (1 << 20)
    require_room(config.out, need, "checkpoints and heads", "name a folder on another disk")


def _draft_ids(config: TrainConfig, store: Store, teacher: str) -> np.ndarray:
    """The draft vocabulary, int32 ascending: the stored logits' if they teach, else the most frequent."""
    V = store.features["target"]["vocab_size"]
    stored = store.draft_ids() if teacher == "stored" else None
    if stored is None:
        return most_frequent(store.token_counts(), config.draft_vocab or min(_DRAFT_VOCAB, V))
    if config.draft_vocab not in (None, len(stored)):
        raise EyasError(
            f"draft_vocab={config.draft_vocab}, but {store.url} has logits of {len(stored)} tokens; leave "
            "draft_vocab out, or use --teacher recompute"
        )
    return stored


def _identity(
    config: TrainConfig, store: Store, head: Head, draft_ids: np.ndarray, steps: int, dtype: str
) -> dict[str, Any]:
    """What two runs must share for one to continue the other."""
    return {
        "config": {name: value for name, value in to_json(config).items() if name not in _FREE + _RESOLVED},
        "store": store.hash,
        "head": to_json(head),
        "draft_ids_crc32": zarr.crc32(draft_ids),
        "target": store.features["target"],
        "steps": steps,
        "dtype": dtype,
    }
