"""Everything about a training run that can be known, and refused, before a step is computed.

Dimensions: R train rows, B rows a batch, T positions.
"""

from dataclasses import fields, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from common import storage, zarr
from common.config import given, to_json
from common.draft_vocab import most_frequent
from common.errors import EyasError
from common.layers import compute_dtype
from common.progress import note
from common.storage import require_room
from common.store import Store
from train import logs, optimizer, pieces
from train.config import TrainConfig
from train.heads import KINDS, chosen, settings_of
from train.heads.head import HEADS, Head
from train.names import EXPERIMENT
from train.order import Order, level, order
from train.pace import evaluations
from train.plan import Plan, room
from train.source import Source
from train.stored import require_inputs, teaching_arrays, whole_teacher
from train.stream import Stream, View
from train.targets import drafted_targets
from train.warm_start import Published, open_published
from train.workload import Workload

_LOOKED_AT = 2**16  # positions, about, to tell what a draft vocabulary is worth
_FEW = 0.5  # of what the target would say
_MOST_ROWS = 2**28  # of all epochs, those outside of a share too: they are put in order, and held in memory
# A run may be continued with other values of these: they change nothing of the weights, or their rounding,
_FREE = ("out", "log_every", "log_to", "cache", "memory", "eval_every", "save_every", "patience")
_FREE += ("accumulate", "dp", "sp")
# or decide on something else that the identity holds, as what is chosen about a kind of head does.
_RESOLVED = ("epochs", "steps", "draft_vocab", "dtype", "store", "teacher")


def make_plan(config: TrainConfig, source: Source | None = None) -> Plan:
    """Checks everything; writes nothing. EyasError names what is wrong. `source`: the store, if it is open
    already."""
    _require_place(config)
    source = source or Source(config.store, config.dp, config.cache, config.memory, config.sp)
    store = source.store
    pieces.require(store.length, source.pieces, config.ttt_steps, store.url)
    if storage.is_inside(config.out, store.url):
        raise EyasError(
            f"out={config.out} is in the store {store.url}, which is read only; name another folder"
        )
    published = open_published(config.init_folder, config.kind, store) if config.init_folder else None
    teacher = config.teacher or whole_teacher(store)
    draft_ids = _draft_ids(config, teacher, store, published)
    head = _head(config, store, len(draft_ids), published)
    _require_read(config, teacher, store, head)
    head.require_fit(store.target_config(), "the head")
    head.require_pieces(source.pieces, "the head")
    head.require_steps(config.ttt_steps, "the head")
    rate = config.learning_rate or optimizer.peak(config.optimizer, head.hidden_size)
    config = replace(config, learning_rate=rate)
    _check_room(config, head)
    counted = _counted(config, source, draft_ids)
    workload, wanted = source.workload(config.ttt_steps, config.compat), _order(config, source)
    dtype, steps, held_out = compute_dtype(config.dtype), len(wanted.rows), len(source.test_rows)
    every, part = evaluations(steps, config.batch_rows, store.length, held_out)
    shares = head.shares(config.anchors, config.ttt_steps)
    if config.anchors < 1 and min(shares) == 1:
        note(f"train: anchors={config.anchors:g} does nothing with ttt_steps={config.ttt_steps}")
    capacity = workload.capacity(wanted.rows, source.groups * config.accumulate, shares)
    parts = config.accumulate, shares, config.data_seed
    view = View(wanted, workload, capacity, teacher, draft_ids, head.inputs, *parts)
    for one in (teacher, whole_teacher(store)):  # of training, and of evaluations
        Stream(store, source.mesh, [replace(view, teacher=one)], source.memory)  # if there is memory
    return Plan(
        config=config,
        source=source,
        head=head,
        draft_ids=draft_ids,
        dtype=jnp.dtype(dtype),
        order=wanted,
        view=view,
        counted=counted,
        eval_every=config.eval_every or every,
        eval_rows=held_out if config.eval_every else part,
        save_every=config.save_every,
        published=published,
        identity=_identity(config, store, head, draft_ids, steps, dtype)
        | {"teacher": teacher}
        | ({"init": published.sums} if published else {}),
    )


def _require_place(config: TrainConfig) -> None:
    """EyasError if there can be no run in the folder `out`, or its trackers cannot tell of one there."""
    if storage.is_remote(config.out) and not config.out.startswith("gs://"):
        raise EyasError(f"out={config.out} is no local folder nor in a gs:// bucket; name one of those")
    storage.require_folder(config.out)
    logs.require(config.log_to or (), config.out)


def _require_read(config: TrainConfig, teacher: str, store: Store, head: Head) -> None:
    """EyasError if the store has not all that the teacher needs and the head reads."""
    whole = whole_teacher(store)
    taught = teaching_arrays(store, teacher, head.inputs)
    if config.teacher_temperature != 1 and "topk_logprobs" in taught:
        raise EyasError(
            f"teacher_temperature={config.teacher_temperature:g} needs all of the target's logits, of which "
            f"{store.url} has the largest; give 1"
            + (", or --teacher recompute" if whole == "recompute" else "")
        )
    if teacher == "recompute" and whole != teacher:
        raise EyasError(
            f"{store.url} was not dumped with all of last_hidden, which --teacher recompute needs; use "
            "--teacher stored"
        )
    if config.noise and not head.inputs.aux_layers:
        raise EyasError(f"noise={config.noise:g} is on aux states, and the head reads none; leave it out")


def _counted(config: TrainConfig, source: Source, draft_ids: np.ndarray) -> int:
    """How many positions of an epoch count. EyasError if there is nothing to begin with or to learn from."""
    store, rows = source.store, source.rows(config.data_seed, config.share)
    if config.init == "fitted" and not (rows < store.rows_with("last_hidden")).any():
        raise EyasError(
            f"init=fitted is a regression to last_hidden, which {store.url} has of no row that is trained "
            "on; give --init target, normal or the folder of a head, or dump with --last-hidden first"
        )
    workload = source.workload(config.ttt_steps, config.compat)
    counted = workload.counted(rows)
    if not counted:
        raise EyasError(
            f"{config.store} has nothing to learn from: no position of its {len(rows)} train rows predicts "
            "an answer's token; prepare conversations with assistant turns"
        )
    source.once(
        ("coverage", zarr.crc32(draft_ids), config.compat, config.data_seed, config.share),
        lambda: _require_coverage(store, workload, rows, draft_ids),
    )
    return counted


def _order(config: TrainConfig, source: Source) -> Order:
    """The rows of every step. EyasError if they are too many, or patience has nothing to go by."""
    count, B = len(source.rows(config.data_seed, config.share)), config.batch_rows
    steps = config.steps or max(1, round(config.epochs * count / B))
    epochs = -(-steps * B // count)
    if epochs * len(source.train_rows) > _MOST_ROWS:
        raise EyasError(
            f"{steps} steps of {B} rows are {epochs} epochs of {len(source.train_rows)} "
            f"train rows, more than {_MOST_ROWS} rows; give fewer --steps or --epochs, or a larger --share"
        )
    if config.patience is not None and not len(source.test_rows):
        raise EyasError(
            f"{config.store} has no held-out rows, by which patience={config.patience} could tell a better "
            "head; leave it out, or prepare a store with holdout above 0"
        )
    work = source.workload(config.ttt_steps).targets  # whatever the mask: the order is that of all of a sweep
    wanted = order(source.train_rows, config.data_seed, steps, B, config.share, work[source.train_rows])
    return level(wanted, work, source.groups * config.accumulate)


def _check_room(config: TrainConfig, head: Head) -> None:
    if not storage.exists(storage.join(config.out, EXPERIMENT)):
        require_room(config.out, room(config, head), "checkpoints and heads", "name a folder on another disk")


def _draft_ids(config: TrainConfig, teacher: str, store: Store, published: Published | None) -> np.ndarray:
    """The draft vocabulary, int32 ascending: the published head's, or the stored logits' if they teach, else
    the most frequent, as many as is usual for the kind."""
    V = store.features["target"]["vocab_size"]
    stored = store.draft_ids() if teacher == "stored" else None
    ids, whose = (published.draft_ids, published.folder) if published else (stored, store.url)
    if ids is None:
        usual = HEADS[config.kind].draft_vocab or V
        return most_frequent(store.token_counts(), config.draft_vocab or min(usual, V))
    if config.draft_vocab not in (None, len(ids)):
        raise EyasError(
            f"draft_vocab={config.draft_vocab}, but {whose} has logits of {len(ids)} tokens; leave it out, "
            "or use --teacher recompute and a new head"
        )
    if stored is not None and not np.array_equal(stored, ids):
        raise EyasError(
            f"the draft vocabulary of {whose} is not that of the logits in {store.url}; use --teacher "
            "recompute"
        )
    return ids


def _require_coverage(store: Store, workload: Workload, rows: np.ndarray, draft_ids: np.ndarray) -> None:
    """EyasError if the draft vocabulary has none of the tokens that the target would say: a head would have a
    loss of 0. Says so if it has few of them."""
    some = rows[workload.drafted[rows] > 0]
    some = some[:: max(1, len(some) * store.length // _LOOKED_AT)]
    found = store.read(("segment_ids", "loss_mask", "argmax"), some)
    targets = workload.masks(found["segment_ids"], found["loss_mask"])[1]
    said = found["argmax"][drafted_targets(targets, found["segment_ids"])]
    share = float(np.isin(said, draft_ids).mean())
    what = f"of {len(said):,} tokens that the target would say, the draft vocabulary of {len(draft_ids):,}"
    if not share:
        raise EyasError(f"{what} has none, so there is nothing to learn; give a larger --draft-vocab")
    if share < _FEW:
        note(f"train: {what} has {share:.1%}; the others are never drafted: a larger --draft-vocab has more")


def _head(config: TrainConfig, store: Store, draft_vocab_size: int, published: Published | None) -> Head:
    """The head to train: a new one, or the published one with what may differ of it."""
    stored, kind = tuple(store.features["aux_layers"]), HEADS[config.kind]
    aux_layers = config.aux_layers or stored
    if outside := set(aux_layers) - set(stored):
        raise EyasError(
            f"aux_layers={list(aux_layers)}, but {store.url} has those of {list(stored)} and not "
            f"{min(outside)}; choose among them, or dump a store with --aux-layers"
        )
    if published is None:
        options = chosen(config.kind, vars(config))
        head = kind.for_target(store.target_config(), draft_vocab_size, aux_layers, **options)
    else:
        head = published.head.asked(given(config, settings_of(config.kind)), published.folder)
    where = published.folder if published else f"a head of kind={config.kind}"
    require_inputs(head.inputs, store, where)
    if config.aux_layers not in (None, head.inputs.aux_layers):
        raise EyasError(
            f"aux_layers={list(config.aux_layers)}, but {where} reads "
            f"{list(head.inputs.aux_layers) or 'no aux states'}; leave it out"
        )
    return head


def _identity(
    config: TrainConfig, store: Store, head: Head, draft_ids: np.ndarray, steps: int, dtype: str
) -> dict[str, Any]:
    """What two runs must share for one to continue the other."""
    of_heads = {name for kind in KINDS for name in settings_of(kind)}
    of_training = set(settings_of(config.kind)) - {field.name for field in fields(head)}
    decided = {*_FREE, *_RESOLVED, *of_heads} - of_training
    return {
        "config": {name: value for name, value in to_json(config).items() if name not in decided},
        "store": store.hash,
        "head": to_json(head),
        "draft_ids_crc32": zarr.crc32(draft_ids),
        "target": store.features["target"],
        "steps": steps,
        "dtype": dtype,
    }
