"""A complete feature store of a made-up target, whose next state follows from the current token alone.

Two train rows for each test row; a row holds two documents and some padding.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from common import safetensors, storage, zarr
from common.channels import decode_channels, encode_channels
from common.checked import sha256
from common.codec import Codec, encode_states
from common.config import digest
from common.store import tensor_file
from common.store_writer import FeatureWriter, create_features, describe_arrays, write_rows
from tests import tiny_llama

TARGET = tiny_llama.CONFIG
V, H, T, ROWS = TARGET["vocab_size"], TARGET["hidden_size"], 24, 15
AUX_LAYERS = (2, 4, 5)


def write_store(
    url: str,
    codec: str = "none",
    precision: str = "float32",
    blocks: int | None = None,
    mask: int = 1,
    test: bool = True,
    rows: int = ROWS,
    longest: int | None = None,
    last_rows: int | None = None,
) -> str:
    """The store at `url`. `blocks` of 4 rows are committed, None: all; `mask` 0: no answers at all.

    `longest`: of documents of so many tokens, each all of it an answer.
    """
    rng = np.random.default_rng(5)
    columns = _rows(rng, rows, mask)
    if longest:
        number, position = np.divmod(np.arange(T, dtype=np.int32), longest)
        columns["segment_ids"][:], columns["positions"][:] = number + 1, position
        columns["loss_mask"][:] = 1
    tokens = columns["tokens"]
    train = np.arange(rows) % 3 != 2 if test else np.ones(rows, bool)
    split = [side for row in train for side in [["test", "train"][int(row)]] * 2]
    index = {"id": [str(n) for n in range(2 * rows)], "split": split, "row": np.repeat(np.arange(rows), 2)}
    index = pa.table(index | {"length": np.full(2 * rows, T // 2)})
    counted = tokens[train][columns["loss_mask"][train] > 0]
    counts = np.bincount(counted, minlength=V).astype(np.int64)
    write_rows(url, columns, counts, index, {"rows": rows, "length": T, "vocab_size": V})
    embed, lm_head = rng.normal(size=(2, V, H)).astype(np.float32)
    values = _features(rng, embed[tokens], lm_head, counts, codec)
    ids = values.pop("ids")
    encoding = Codec(codec, 0, precision, last_rows)
    squares = {name: np.square(values[name]).sum((0, 1)) for name in encoding.channels(3, H)}
    channels = encode_channels(squares)
    scales = decode_channels(channels, encoding.channels(3, H))
    states = values.pop("aux_hidden"), values.pop("last_hidden")
    values |= {name: np.asarray(x) for name, x in encode_states(encoding, *states, scales).items()}
    values |= {name: x[:last_rows] for name, x in values.items() if name.startswith("last_")}
    tensors = {"embed_tokens": embed, "lm_head": lm_head}
    files = {tensor_file(name): safetensors.to_bytes({name: tensor}) for name, tensor in tensors.items()}
    files["config.json"] = storage.json_bytes(TARGET)
    features = {
        "target": {"name": "made-up", "architecture": "LlamaForCausalLM", "config_hash": digest(TARGET)}
        | {"hidden_size": H, "vocab_size": V, "layers": 8},
        "aux_layers": list(AUX_LAYERS),
        "codec": {"name": codec, "size": {"topk": V, "draft": 32, "full": V}.get(codec, 0)}
        | ({} if ids is None else {"ids_crc32": zarr.crc32(ids)}),
        "precision": precision,
        **({"channels": channels} if channels else {}),
        "block_rows": 4,
        "arrays": describe_arrays({n: (x.shape, x.dtype) for n, x in values.items()}, 4),
        "target_files": {name: sha256(data) for name, data in files.items()},
    }
    create_features(url, features, ids)
    with FeatureWriter(url) as writer:
        for block in range(writer.store.blocks if blocks is None else blocks):
            parts = {name: np.ascontiguousarray(x[4 * block : 4 * block + 4]) for name, x in values.items()}
            part = {name: x for name, x in parts.items() if len(x)}
            writer.write(block, part, 0, 0)
    for name, data in files.items():
        storage.write_bytes(f"{url}/target/{name}", data)
    return url


def _rows(rng: np.random.Generator, rows: int, mask: int) -> dict[str, np.ndarray]:
    segments, positions = np.zeros((2, rows, T), np.int32)
    for row in range(rows):
        cut, end = int(rng.integers(4, T - 8)), T - int(rng.integers(0, 4))
        segments[row, :cut], segments[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
    # Frequent and rare tokens, so that a draft vocabulary has something to choose.
    tokens = np.where(segments > 0, rng.geometric(0.08, (rows, T)) % V, 0).astype(np.int32)
    answers = ((segments > 0) & (positions > 1)).astype(np.uint8) * np.uint8(mask)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": answers}


def _features(rng, embedded, lm_head, counts, codec: str) -> dict[str, Any]:
    last = np.tanh(embedded)
    logits = last @ lm_head.T
    ids = np.sort(np.argsort(-counts, kind="stable")[:32]).astype(np.int32) if codec == "draft" else None
    found: dict[str, Any] = {
        "ids": ids,
        "aux_hidden": rng.normal(size=(*last.shape[:2], 3, H)).astype(np.float32),
        "last_hidden": last.astype(np.float32),
        "argmax": logits.argmax(-1).astype(np.int32),
        "logsumexp": np.log(np.exp(logits).sum(-1)).astype(np.float32),
    }
    logp = logits - found["logsumexp"][..., None]
    if codec == "topk":
        found["topk_ids"] = np.argsort(-logits, -1, kind="stable").astype(np.int32)
        found["topk_logprobs"] = np.take_along_axis(logp, found["topk_ids"], -1).astype(np.float16)
    if codec == "draft":
        found["draft_logprobs"] = logp[..., ids].astype(np.float32)
    if codec == "full":
        found["full_logprobs"] = logp.astype(np.float32)
    return found
