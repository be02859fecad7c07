"""Batches of conversations become tokens and masks: the part of prepare that takes the time."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dump.chat import Chat, Rendered, TemplateNotFollowedError
from dump.clean import Conversation
from dump.template import TemplateRanAwayError, TemplateRefusedError

RUNAWAYS = 3  # conversations in which a template may run away, each of which may take seconds


@dataclass
class Encodings:
    """The conversations of a batch that have counted tokens within T, one behind the other.

    `kept`: which of the batch they are; `tokens` int32 and `mask` uint8, cut at T; `lengths` of each,
    `counted` tokens of each, and `read`: its tokens before the cut, all int32. `counts` are of
    dump/prepare.py; `refusal` is the first one's reason, `runaways` those of all.
    """

    kept: list[int] = field(default_factory=list)
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    counted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    read: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    counts: Counter[str] = field(default_factory=Counter)
    refusal: str = ""
    runaways: list[str] = field(default_factory=list)


def encode(chat: Chat, batch: list[Conversation], T: int) -> Encodings:
    """What is kept of a batch. It ends early where the template has run away too often to go on."""
    made, rendered = Encodings(), []
    for number, conversation in enumerate(batch):
        found = _render(chat, conversation, made)
        if found is not None:
            rendered.append((number, found))
        if len(made.runaways) == RUNAWAYS:
            break
    tokens, masks, read = [], [], []
    for (number, _), found in zip(rendered, chat.encode([r for _, r in rendered]), strict=True):
        length = len(found.tokens)
        made.counts["truncated"] += length > T
        made.counts["truncated_tokens"] += max(length - T, 0)
        if not found.mask[:T].any():
            made.counts["dropped_nothing_counted"] += 1
            continue
        made.kept.append(number)
        tokens.append(found.tokens[:T])
        masks.append(found.mask[:T])
        read.append(length)
    if made.kept:
        made.tokens, made.mask = np.concatenate(tokens), np.concatenate(masks)
        made.lengths = np.array([len(t) for t in tokens], np.int32)
        made.counted = np.array([m.sum() for m in masks], np.int32)
        made.read = np.array(read, np.int32)
    return made


def _render(chat: Chat, conversation: Conversation, made: Encodings) -> Rendered | None:
    messages, tools, counts = conversation.messages, conversation.tools, made.counts
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
        made.runaways.append(str(error))
    except TemplateRefusedError as error:
        made.refusal = made.refusal or str(error)
        counts["dropped_template_refused"] += 1
    except TemplateNotFollowedError:
        counts["dropped_template_not_followed"] += 1
    return None
