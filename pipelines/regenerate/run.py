"""The whole of regenerate: questions are read, asked, and their answers recorded, each once."""

import asyncio
import math
import os
import re
import time
from contextlib import AsyncExitStack
from typing import Any

from common import storage
from common.config import to_json
from common.device_errors import device_errors
from common.errors import EyasError, RestartError
from common.lock import locked_file
from common.progress import Progress, note
from dump.data_files import require_apart
from dump.sources import Sources
from pipelines.regenerate.answers import Answers
from pipelines.regenerate.config import RegenerateConfig
from pipelines.regenerate.endpoint import Endpoint, key_of
from pipelines.regenerate.local import Local
from pipelines.regenerate.questions import Questions
from pipelines.regenerate.record import Record, place
from pipelines.regenerate.talk import REJECTED, Talk
from pipelines.regenerate.work import Work

_REASONS = 5  # for rejections that are told
_SYNC = 5.0  # seconds between two times that what was answered is forced to disk

Answerers = list[Endpoint] | list[Local]


@device_errors("give fewer --slots, or a smaller --length")
def run(config: RegenerateConfig) -> dict[str, Any]:
    """Answers the questions of `config.data` into `config.out`; returns what became of them.

    What is answered already stays as it is. EyasError for data that asks nothing, answers of other settings,
    or endpoints that refuse; RestartError if some conversations are left without an answer.
    """
    out = os.path.realpath(storage.local_path(config.out))  # its lock and record lie beside the file itself
    answerers = [Local(config)] if config.model else _endpoints(config)
    storage.require_file(out)
    require_apart(config.data, (out, place(out)))
    with locked_file(out) as check:
        storage.remove_partial(os.path.dirname(out))
        sources = Sources(config.data)
        record = Record(out, _settings(config, sources, answerers), config.endpoint or ())
        with Questions(os.path.dirname(out)) as questions:
            counts = questions.read(sources, config.max_conversations or math.inf)
            record.write(conversations=len(questions))
            with Answers(out, len(questions), questions.is_asked, check) as answers:
                work = _ask(config, answerers, questions, answers)
                complete = len(answers) == len(questions)
                if complete:
                    answers.finish()
                found = {
                    "conversations": len(questions),
                    "outcomes": dict(sorted(answers.outcomes.items())),
                    "tokens": answers.tokens,
                    "data": {name: n for name, n in counts.items() if n},
                }
                record.write(**found, complete=complete)
                if not complete:
                    raise _unfinished(config, len(questions) - len(answers), len(questions), work)
    return {"out": config.out} | found


def _settings(config: RegenerateConfig, sources: Sources, answerers: Answerers) -> dict[str, Any]:
    """All that decides about the answers, as far as it is known here."""
    local = [answerer.described() for answerer in answerers if isinstance(answerer, Local)]
    return ({"target": local[0]} if local else {}) | {
        "data": [file.identity() for file in sources.files],
        "max_conversations": config.max_conversations,
        "request": to_json(config.fields()),
        "seed": config.seed,
        "truncated": config.truncated,
    }


def _ask(
    config: RegenerateConfig, answerers: Answerers, questions: Questions, answers: Answers
) -> Work | None:
    """Asks what has no answer yet."""
    if len(answers) == len(questions):
        note(f"{config.out} has all answers")
        return None
    with Progress("regenerate", len(questions), " conversations", done=len(answers)) as bar:
        return asyncio.run(_asked(config, answerers, questions, answers, bar))


async def _asked(
    config: RegenerateConfig, answerers: Answerers, questions: Questions, answers: Answers, bar: Progress
) -> Work:
    shown, before, start = len(answers), answers.tokens, time.monotonic()
    synced = start

    reasons: set[str] = set()

    def done(talk: Talk, outcome: str) -> None:
        kind = re.sub(r"[0-9]+", "#", talk.reason)
        if outcome == REJECTED and kind not in reasons and len(reasons) < _REASONS:
            reasons.add(kind)
            note(f"a conversation is rejected: {talk.reason}")
        answers.add(talk, outcome)

    def tick() -> None:
        nonlocal shown, synced
        now, steps = time.monotonic(), len(answers) - shown
        if now - synced > _SYNC:
            answers.sync()
            synced = now
        shown += steps
        rate = (answers.tokens - before) / max(now - start, 1e-9)
        bar.update(steps, f"{answers.tokens:,} tokens, {rate:,.0f} a second")

    left = questions.talks(answers.is_there(number) for number in range(len(questions)))
    work = Work(left, done, config.seed, config.truncated == "keep")
    async with AsyncExitStack() as stack:
        await work.run([await stack.enter_async_context(answerer) for answerer in answerers], tick)
    answers.sync()
    return work


def _endpoints(config: RegenerateConfig) -> list[Endpoint]:
    said = (*config.endpoint, config.served_model, config.extra)
    return [Endpoint(url, key_of(number, *said), config) for number, url in enumerate(config.endpoint, 1)]


def _unfinished(config: RegenerateConfig, left: int, total: int, work: Work | None) -> EyasError:
    """Why conversations are left without an answer."""
    reasons = [f"{name}: {error}" for name, error in work.gone.items()]
    reasons += [f"tried again and again: {talk.reason}" for talk in work.unanswered[:1]]
    mistake = len(work.gone) == len(config.endpoint or ()) and all(e.mistake for e in work.gone.values())
    kind = EyasError if mistake else RestartError
    again = "mend that; the same command goes on" if mistake else "the same command asks them again"
    return kind(f"{left:,} of {total:,} conversations have no answer yet ({'; '.join(reasons)}); {again}")
