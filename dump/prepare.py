"""prepare: conversations become packed rows of tokens, the first part of a store. No device is touched.

read and clean -> the target's own chat template -> tokens and mask -> cut at T -> split -> pack -> write.
Conversations pass in batches and their tokens wait on disk (dump/spill.py): memory holds a few numbers each.
The same input gives the same bytes, whatever the number of cores: the manifest names files and the model
without their folders, and nothing in it depends on time or on an order of execution.

Counts beside those of dump/clean.py, in conversations:
- `dropped_tools`: tools are defined, called or heard, and the target's template knows none.
- `dropped_special_token`: a turn's text spells a special token of the target.
- `dropped_template_refused`: the chat template raised (roles that do not alternate, say).
- `dropped_template_ran_away`: it left its bounds of time or size (dump/template.py); three end the run.
- `dropped_template_not_followed`: the answers could not be located in the rendered text.
- `dropped_nothing_counted`: no counted token is left in the first T.
- `dropped_mix`: beyond what `mix` gives to its source.
- `truncated`: longer than T tokens; `truncated_tokens` is what was cut off in all.
- `turns_system_folded`: system turns in front of the first question, where the template knows no system.
- `turns_reasoning_removed`: turns whose reasoning the template leaves out, as servers do of earlier turns.
- `kept`: in the store. And in lines and files: `lines_not_json` (skipped), `files_cut_off`.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from common import kvstore, schema, storage
from common.config import differences, to_json
from common.errors import EyasError
from common.manifest import INDEX, MANIFEST, ROW_SUMS, read_manifest
from common.progress import Progress, note
from common.schema import NotRequired, Size, TypedDict
from common.store_writer import write_rows
from dump.chat import Chat
from dump.clean import Cleaner, Conversation, base_of
from dump.config import PrepareConfig
from dump.data_files import name_of, require_apart
from dump.encode import RUNAWAYS
from dump.pack import Packed, draw, pack, split
from dump.prepare_report import nonzero, report
from dump.record_shapes import EXPECTED
from dump.rows import ROW_TOKEN_BYTES, columns, index, token_counts
from dump.sources import Sources, limits
from dump.spill import TOKEN_BYTES, Spill
from dump.workers import encode_all

COUNTS = (
    "dropped_tools",
    "dropped_special_token",
    "dropped_template_refused",
    "dropped_template_ran_away",
    "dropped_template_not_followed",
    "dropped_nothing_counted",
    "dropped_mix",
    "truncated",
    "truncated_tokens",
    "turns_system_folded",
    "turns_reasoning_removed",
    "kept",
    "lines_not_json",
    "files_cut_off",
)
_BATCH = 64  # conversations encoded at once
_TOKEN_TEXT = 4  # bytes of a data file that make a token, about
_ROOM = "make room there, or name a store on another disk"


def run(config: PrepareConfig) -> dict[str, Any]:
    """Prepares the rows of `config.store`; returns their section of the manifest.

    A store that already holds the same configuration and data is left alone. EyasError, with nothing
    written, for unusable data or model, and for a store or folder that holds something else.
    """
    kvstore.folder(config.store)  # refused at once where arrays are not kept
    vocab_size = read_vocab_size(config.model)
    chat = Chat.load(config.model)
    require_apart(config.data, [f"{config.store.rstrip('/')}/{name}" for name in (MANIFEST, INDEX)])
    sources = Sources(config.data)
    identity = {
        "length": config.length,
        "vocab_size": vocab_size,
        "tokenizer_hash": chat.tokenizer_hash,
        "template_hash": chat.template_hash,
        "data": [file.identity() for file in sources.files],
        "seed": config.seed,
        "holdout": config.holdout,
        "max_conversations": config.max_conversations,
        "take": to_json(config.take),
        "mix": to_json(config.mix),
    }
    if _is_prepared(config.store, identity):
        note(f"{config.store} is already prepared from this data in this way; left as it is")
        return read_manifest(config.store)["rows"]
    with Spill(config.store) as spill:
        _require_spill_room(config, spill.folder, sources.bytes)
        counts = _read(config, chat, sources, spill)
        most = config.max_conversations or math.inf
        chosen = sources.mixed(spill.sources, config.mix, most) if config.mix else np.arange(len(spill))
        _write(config, identity, spill, counts, chosen)
    return read_manifest(config.store)["rows"]


def _write(
    config: PrepareConfig, identity: dict[str, Any], spill: Spill, counts: Counter[str], chosen: np.ndarray
) -> None:
    """Splits and packs the `chosen` conversations of `spill`, and writes their rows."""
    T, V = config.length, identity["vocab_size"]
    if spill.largest >= V:
        raise EyasError(
            f"{config.model}: the tokenizer gives token {spill.largest}, but config.json has vocab_size {V}; "
            "tokenizer and model do not belong together"
        )
    held_out = split(
        spill.draws[chosen], lambda i: base_of(spill.id(int(chosen[i]))), config.holdout, config.seed
    )
    packed = pack(spill.lengths[chosen], held_out, T, config.seed)
    packed = Packed(chosen[packed.items], packed.first, packed.train_rows)
    counts["kept"], counts["dropped_mix"] = len(chosen), len(spill) - len(chosen)
    tokens = int(spill.lengths[chosen].sum(dtype="int64"))
    manifest = identity | {
        "rows": packed.rows,
        "train_rows": packed.train_rows,
        "test_rows": packed.rows - packed.train_rows,
        "tokens": tokens,
        "counted": int(spill.counted[chosen].sum(dtype="int64")),
        "fill": tokens / (packed.rows * T),
        "counts": dict(counts),
        "config": _portable(config),
    }
    report(manifest, int(held_out.sum()), spill.read[chosen])
    storage.require_room(config.store, ROW_TOKEN_BYTES * packed.rows * T, "the rows", _ROOM)
    learnt = np.zeros(len(spill), bool)
    learnt[chosen[~held_out]] = True
    counted = token_counts(spill, learnt, V)
    write_rows(config.store, columns(spill, packed, T), counted, index(spill, packed), manifest)


def _require_spill_room(config: PrepareConfig, folder: str, size: int) -> None:
    """EyasError if the tokens of `size` bytes of data have no room where they wait."""
    tokens = size // _TOKEN_TEXT
    if config.max_conversations is not None:
        tokens = min(tokens, config.max_conversations * config.length)
    advice = "name a folder on another disk in TMPDIR" if storage.is_remote(config.store) else _ROOM
    storage.require_room(folder, TOKEN_BYTES * tokens, "the tokens, until they are packed,", advice)


def _portable(config: PrepareConfig) -> dict[str, Any]:
    """The configuration without folders: the same data elsewhere gives the same manifest."""
    names = {
        "data": [name_of(path.rstrip("/")) for path in config.data],
        "model": config.model.rstrip("/").rpartition("/")[2],
    }
    return {name: value for name, value in (to_json(config) | names).items() if name != "store"}


class _Sizes(TypedDict):
    """What is read of config.json before the dump reads all of it."""

    vocab_size: NotRequired[Size]
    model_type: NotRequired[str]
    text_config: NotRequired[dict[str, Any]]


def read_vocab_size(model: str) -> int:
    """The target's vocabulary (its tokenizer's may be smaller); of the text part, if it has several."""
    where, advice = f"{model.rstrip('/')}/config.json", "it is not the folder of a language model"
    config = schema.read(_Sizes, where, advice)
    text = schema.check(_Sizes, config.get("text_config", {}), f"{where} (text_config)", advice)
    size = config.get("vocab_size", text.get("vocab_size"))
    if size is None and "text_config" in config:  # multimodal files leave out what equals the defaults
        from transformers import CONFIG_MAPPING

        known = config.get("model_type")
        size = CONFIG_MAPPING[known]().get_text_config().vocab_size if known in CONFIG_MAPPING else None
    if size is None:
        raise EyasError(f"{where} has no vocab_size; {advice}")
    return size


def _is_prepared(store: str, identity: dict[str, Any]) -> bool:
    """True if the store holds these rows, False if there is none. EyasError if it holds anything else."""
    if storage.exists(f"{store.rstrip('/')}/{MANIFEST}"):
        manifest = read_manifest(store, unfinished=True)
        rows = manifest["rows"]
        different = differences({name: rows.get(name) for name in identity}, identity)
        if different:
            raise EyasError(
                f"{store} was prepared in another way: {'; '.join(different)}; name a new store, or delete it"
            )
        return not manifest.get("unfinished")
    storage.require_folder(store)
    ours = (
        "rows",
        INDEX,
        ROW_SUMS,
        f".{INDEX}.",
        f".{ROW_SUMS}.",
        MANIFEST,
    )  # and what an interrupted prepare leaves
    foreign = [name for name in storage.list_names(store) if not name.startswith(ours)]
    if foreign:
        raise EyasError(f"{store} is no store and not empty (it has {foreign[0]}); name a new folder")
    return False


def _read(config: PrepareConfig, chat: Chat, sources: Sources, spill: Spill) -> Counter[str]:
    """Fills `spill` with what is kept, and counts what is not."""
    cleaner = Cleaner()
    counts = cleaner.counts
    counts.update(dict.fromkeys(COUNTS, 0))
    tokens, runaways = 0, []
    total = config.max_conversations or math.inf
    wanted = limits(len(config.data), config.take, config.mix, total)
    with Progress("read and tokenise", sources.bytes, "B") as bar:
        conversations = sources.conversations(cleaner, bar.update, math.inf if config.mix else total, wanted)
        batches = _batches(conversations)
        encoded = encode_all(chat, config.model, batches, config.length)
        with closing(conversations), closing(batches), closing(encoded):
            for batch, found in encoded:
                kept = [batch[i] for i in found.kept]
                draws = [draw(c.base, config.seed) for c in kept]
                spill.add(found, [c.id for c in kept], draws, [c.source for c in kept])
                if found.refusal and not counts["dropped_template_refused"]:
                    note(f"the chat template refuses conversations, which are left out: {found.refusal}")
                counts.update(found.counts)
                runaways += found.runaways
                _require_bounds(runaways)
                tokens += len(found.tokens)
                bar.update(0, f"{len(spill):,} kept, {tokens:,} tokens")
    counts["lines_not_json"] = sum(file.bad_lines for file in sources.files)
    counts["files_cut_off"] = sum(file.cut_off for file in sources.files)
    _require_some(len(spill), counts, config, cleaner.malformed)
    if cleaner.malformed:
        first = f"the first is {cleaner.malformed}; expected {EXPECTED}"
        note(f"{counts['dropped_malformed']:,} records have a shape that is not read: {first}")
    spill.finish()
    return counts


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while batch := list(islice(conversations, _BATCH)):
        yield batch


def _require_bounds(runaways: list[str]) -> None:
    if len(runaways) >= RUNAWAYS:
        raise EyasError(
            f"the chat template ran away in {RUNAWAYS} conversations ({runaways[RUNAWAYS - 1]}); use the one "
            "that is published with the model"
        )


def _require_some(kept: int, counts: Counter[str], config: PrepareConfig, malformed: str) -> None:
    """EyasError if nothing is left to learn from; `malformed`: the shape of a record that is not read."""
    if kept:
        return
    where = ", ".join(config.data)
    if not counts["read"]:
        raise EyasError(f"{where}: no conversations found; expected at least one record")
    if malformed and counts["dropped_malformed"] == counts["read"]:
        raise EyasError(f"{where}: the first record is {malformed}; expected {EXPECTED}")
    reasons = ", ".join(f"{n} {name.removeprefix('dropped_')}" for name, n in nonzero(counts, "dropped_"))
    raise EyasError(
        f"{where}: none of {counts['read']} conversations has an answer to learn from ({reasons}); "
        "give conversations with assistant turns"
    )
