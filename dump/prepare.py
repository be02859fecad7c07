"""prepare: conversations become packed rows of tokens, the first part of a store. No device is touched.

read and clean -> the target's own chat template -> tokens and mask -> cut at T -> split -> pack -> write.
The same input gives the same bytes, whatever the number of cores: the manifest names files and the model
without their folders, and nothing in it depends on time or on an order of execution.

Counts beside those of dump/clean.py, in conversations:
- `dropped_tools`: tools are defined, called or heard, and the target's template knows none.
- `dropped_special_token`: a turn's text spells a special token of the target.
- `dropped_template_refused`: the chat template raised (roles that do not alternate, say).
- `dropped_template_ran_away`: it left its bounds of time or size (dump/template.py); three end the run.
- `dropped_template_not_followed`: the answers could not be located in the rendered text.
- `dropped_nothing_counted`: no counted token is left in the first T.
- `truncated`: longer than T tokens; `truncated_tokens` is what was cut off in all.
- `turns_system_folded`: system turns in front of the first question, where the template knows no system.
- `turns_reasoning_removed`: turns whose reasoning the template leaves out, as servers do of earlier turns.
- `kept`: in the store. And in lines and files: `lines_not_json` (skipped), `files_cut_off`.
"""

from collections import Counter
from contextlib import closing
from typing import Any

import numpy as np

from common import schema, storage
from common.config import differences, to_json
from common.errors import EyasError
from common.manifest import INDEX, MANIFEST, ROW_SUMS, read_manifest
from common.progress import Progress, note
from common.schema import NotRequired, Size, TypedDict
from common.store_writer import write_rows
from dump.chat import Chat, Encoded, Rendered, TemplateNotFollowedError
from dump.clean import Cleaner, Conversation
from dump.config import PrepareConfig
from dump.conversations import DataFile
from dump.data_files import find_files
from dump.pack import pack, split
from dump.prepare_report import nonzero, report
from dump.record_shapes import EXPECTED
from dump.template import TemplateRanAwayError, TemplateRefusedError

COUNTS = (
    "dropped_tools",
    "dropped_special_token",
    "dropped_template_refused",
    "dropped_template_ran_away",
    "dropped_template_not_followed",
    "dropped_nothing_counted",
    "truncated",
    "truncated_tokens",
    "turns_system_folded",
    "turns_reasoning_removed",
    "kept",
    "lines_not_json",
    "files_cut_off",
)
_RUNAWAYS = 3  # each may take seconds
_BATCH = 256  # conversations given to the tokenizer at once; it spreads them over the cores


def run(config: PrepareConfig) -> dict[str, Any]:
    """Prepares the rows of `config.store`; returns their section of the manifest.

    A store that already holds the same configuration and data is left alone. EyasError, with nothing
    written, for unusable data or model, and for a store or folder that holds something else.
    """
    vocab_size = read_vocab_size(config.model)
    chat = Chat.load(config.model)
    sources = _open(config)
    identity = {
        "length": config.length,
        "vocab_size": vocab_size,
        "tokenizer_hash": chat.tokenizer_hash,
        "template_hash": chat.template_hash,
        "data": [source.identity() for source in sources],
        "seed": config.seed,
        "holdout": config.holdout,
        "max_conversations": config.max_conversations,
    }
    if _is_prepared(config.store, identity):
        note(f"{config.store} is already prepared from this data in this way; left as it is")
        return read_manifest(config.store)["rows"]
    conversations, counts = _read(config, sources)
    conversations, encoded, lengths = _encode(chat, conversations, config.length, counts)
    _require_tokens(conversations, encoded, vocab_size, counts, config)
    held_out = split([c.base for c in conversations], config.holdout, config.seed)
    ids = [c.id for c in conversations]
    packed = pack(ids, encoded, held_out, config.length, vocab_size, config.seed)
    rows = len(packed.arrays["tokens"])
    tokens = int((packed.arrays["segment_ids"] > 0).sum())
    manifest = identity | {
        "rows": rows,
        "train_rows": packed.train_rows,
        "test_rows": rows - packed.train_rows,
        "tokens": tokens,
        "counted": int(packed.arrays["loss_mask"].sum()),
        "fill": tokens / (rows * config.length),
        "counts": dict(counts),
        "config": _portable(config),
    }
    report(manifest, int(held_out.sum()), lengths)
    write_rows(config.store, packed.arrays, packed.token_counts, packed.index, manifest)
    return read_manifest(config.store)["rows"]


def _portable(config: PrepareConfig) -> dict[str, Any]:
    """The configuration without folders: the same data elsewhere gives the same manifest."""
    names = {
        "data": [path.rstrip("/").rpartition("/")[2] for path in config.data],
        "model": config.model.rstrip("/").rpartition("/")[2],
    }
    return {name: value for name, value in (to_json(config) | names).items() if name != "store"}


def _open(config: PrepareConfig) -> list[DataFile]:
    with Progress("check data", None, "B") as bar:
        return [DataFile.open(url, bar.update) for url in find_files(config.data)]


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


def _read(config: PrepareConfig, sources: list[DataFile]) -> tuple[list[Conversation], Counter[str]]:
    """The cleaned conversations, at most `max_conversations`, and the counts so far."""
    cleaner, conversations = Cleaner(), []
    with Progress("read and clean", sum(source.bytes for source in sources), "B") as bar:
        for source in sources:
            with closing(source.records(bar.update)) as records:
                for number, record in enumerate(records):
                    conversation = cleaner.clean(record, number, source.name)
                    if conversation is not None:
                        conversations.append(conversation)
                    if len(conversations) == config.max_conversations:
                        break
            source.require_json()
            if len(conversations) == config.max_conversations:
                break
    counts = cleaner.counts
    counts.update(dict.fromkeys(COUNTS, 0))
    counts["lines_not_json"] = sum(source.bad_lines for source in sources)
    counts["files_cut_off"] = sum(source.cut_off for source in sources)
    _require_some(conversations, counts, config, cleaner.malformed)
    if cleaner.malformed:
        first = f"the first is {cleaner.malformed}; expected {EXPECTED}"
        note(f"{counts['dropped_malformed']:,} records have a shape that is not read: {first}")
    return conversations, counts


def _require_some(kept: list[Any], counts: Counter[str], config: PrepareConfig, malformed: str = "") -> None:
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


def _encode(
    chat: Chat, conversations: list[Conversation], T: int, counts: Counter[str]
) -> tuple[list[Conversation], list[Encoded], np.ndarray]:
    """The conversations that have counted tokens within T, those tokens, and how many there were before T."""
    kept, encoded, lengths, tokens = [], [], [], 0
    with Progress("tokenise", len(conversations), "chat") as bar:
        for start in range(0, len(conversations), _BATCH):
            batch = conversations[start : start + _BATCH]
            rendered = [(c, r) for c in batch if (r := _render(chat, c, counts)) is not None]
            whole = chat.encode([r for _, r in rendered])
            for (conversation, _), found in zip(rendered, whole, strict=True):
                tokens += len(found.tokens)
                counts["truncated"] += len(found.tokens) > T
                counts["truncated_tokens"] += max(len(found.tokens) - T, 0)
                if not found.mask[:T].any():
                    counts["dropped_nothing_counted"] += 1
                    continue
                kept.append(conversation)
                lengths.append(len(found.tokens))
                encoded.append(Encoded(found.tokens[:T].copy(), found.mask[:T].copy()))
            bar.update(len(batch), f"{tokens:,} tokens")
    counts["kept"] = len(kept)
    return kept, encoded, np.array(lengths, np.int64)


def _render(chat: Chat, conversation: Conversation, counts: Counter[str]) -> Rendered | None:
    messages, tools = conversation.messages, conversation.tools
    if not chat.has_tools and (tools or any(m["role"] == "tool" or m.get("calls") for m in messages)):
        counts["dropped_tools"] += 1
        return None
    if chat.holds_special(messages, tools):
        counts["dropped_special_token"] += 1
        return None
    try:
        rendered = chat.render(messages, tools)
        counts["turns_system_folded"] += messages[0]["role"] == "system" and not chat.has_system
        counts["turns_reasoning_removed"] += rendered.removed
        return rendered
    except TemplateRanAwayError as error:
        counts["dropped_template_ran_away"] += 1
        if counts["dropped_template_ran_away"] == _RUNAWAYS:
            raise EyasError(
                f"the chat template ran away in {_RUNAWAYS} conversations ({error}); use the one that is "
                "published with the model"
            ) from None
    except TemplateRefusedError as error:
        if not counts["dropped_template_refused"]:
            note(f"the chat template refuses conversations; they are left out. It says: {error}")
        counts["dropped_template_refused"] += 1
    except TemplateNotFollowedError:
        counts["dropped_template_not_followed"] += 1
    return None


def _require_tokens(
    conversations: list[Conversation],
    encoded: list[Encoded],
    V: int,
    counts: Counter[str],
    config: PrepareConfig,
) -> None:
    _require_some(conversations, counts, config)
    largest = max(int(found.tokens.max()) for found in encoded)
    if largest >= V:
        raise EyasError(
            f"{config.model}: the tokenizer gives token {largest}, but config.json has vocab_size {V}; "
            "tokenizer and model do not belong together"
        )
