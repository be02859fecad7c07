"""A running server, with a head and without: tokens a second, latency, and the acceptance that it tells.

Requests are chat completions that are streamed, so many in flight all the time; those of the two servers take
turns, level by level, so that both see the same machine.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from common import strict_json
from common.errors import EyasError, MachineError
from common.library_errors import reason
from common.progress import Progress, note
from pipelines import figures
from pipelines.regenerate.config import completions_url
from pipelines.regenerate.endpoint import LARGEST, key_of, may_pass
from pipelines.regenerate.reply import RubbishError, events, read_problem, read_stream
from pipelines.serving import counters
from pipelines.serving.config import BenchServerConfig
from pipelines.serving.counters import Drafts
from pipelines.serving.prompts import PROMPTS

Messages = list[dict[str, Any]]
_WARM_UP = 8  # tokens of the requests before a level


@dataclass(frozen=True)
class Request:
    """What came of one: seconds from its start, tokens, and what SGLang says of its drafts."""

    first: float
    whole: float
    tokens: int
    drafts: Drafts


def run(config: BenchServerConfig) -> dict[str, Any]:
    """{"url", "without", "levels": [{"concurrency", "with": figures, "without": figures, "speed_up"}]}.

    Written to `config.out` as well, if it is given. EyasError for an address, a name or a key that the server
    does not take; MachineError for a server that fails.
    """
    if config.out:
        figures.require_place(config.out, config.data or ())
    prompts = _prompts(config)
    said = (config.url, config.without, config.served_model)
    sides = {"with": _Side(config.url, key_of(1, *said), config)}
    if config.without:
        sides["without"] = _Side(config.without, key_of(2, *said), config)
    levels = asyncio.run(_levels(config, sides, prompts))
    found = {"url": config.url, "without": config.without, "levels": levels}
    if config.out:
        figures.write(config.out, found)
    return found


async def _levels(
    config: BenchServerConfig, sides: dict[str, "_Side"], prompts: list[Messages]
) -> list[dict[str, Any]]:
    levels = []
    for width in config.concurrency:
        count = max(config.requests, 2 * width)
        asked = [prompts[i % len(prompts)] for i in range(count)]
        level: dict[str, Any] = {"concurrency": width, "requests": count}
        for name, side in sides.items():
            note(f"bench-server: {count} requests, {width} in flight, {side.url}")
            async with side.session() as session:
                await side.look(session)
                await side.ask(session, asked[:width], width, _WARM_UP)
                level[name] = await side.measured(session, asked, width)
        if "without" in level:
            level["speed_up"] = level["with"]["tokens_per_s"] / level["without"]["tokens_per_s"]
        levels.append(level)
    return levels


class _Side:
    """One of the two servers."""

    def __init__(self, url: str, key: str | None, config: BenchServerConfig) -> None:
        self.url, self._key, self._config = url.rstrip("/"), key, config
        self._fields: dict[str, Any] = {}
        self._chat = completions_url(url)
        self._root = self._chat.removesuffix("/chat/completions").removesuffix("/v1")

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=30.0),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def look(self, session: aiohttp.ClientSession) -> None:
        """Finds out what it serves, and whether it is SGLang, which is asked for each request's drafts.

        EyasError if it does not say what it serves, and nobody else did.
        """
        name = self._config.served_model
        if not name:
            with self._told():
                name = self._only_model(await self._get(session, "/v1/models"))
        self._fields = self._config.fields() | {"model": name}
        if "speculative_algorithm" in await self._page(session, "/get_server_info"):
            self._fields["return_spec_tokens_details"] = True

    def _only_model(self, page: str) -> str:
        try:
            names = [one["id"] for one in strict_json.parse(page.encode(), "its reply")["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if len(names) != 1 or not isinstance(names[0], str):
            told = f"serves {len(names)} models" if names else "does not say what it serves"
            raise EyasError(f"{self.url} {told}{_ADVICE}")
        return names[0]

    async def measured(
        self, session: aiohttp.ClientSession, asked: Sequence[Messages], width: int
    ) -> dict[str, Any]:
        """The figures of one level."""
        before = await self._page(session, "/metrics")
        began = time.perf_counter()
        with Progress("answers", len(asked), "answer") as progress:
            done = await self.ask(session, asked, width, self._config.max_tokens, progress.update)
        seconds = time.perf_counter() - began
        after = counters.read(await self._page(session, "/metrics"))
        if after is not None:  # which is a life's average where nobody knows what was before
            drafts = after.since(counters.read(before) or Drafts()) if before else Drafts()
        else:
            drafts = Drafts(sum(r.drafts.drafts for r in done), sum(r.drafts.accepted for r in done))
        return _figures(done, seconds, drafts)

    async def ask(
        self,
        session: aiohttp.ClientSession,
        asked: Sequence[Messages],
        width: int,
        tokens: int,
        progress: Callable[[int], None] = lambda n: None,
    ) -> list[Request]:
        """All of `asked`, `width` in flight. What fails ends it."""
        free = asyncio.Semaphore(width)

        async def one(number: int, messages: Messages) -> Request:
            async with free:
                found = await self._timed(session, messages, tokens, number)
                progress(1)
                return found

        with self._told():
            found = await asyncio.gather(*(one(i, messages) for i, messages in enumerate(asked)))
        return list(found)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong with the server, in one line."""
        try:
            yield
        except RubbishError as error:
            raise EyasError(f"{self.url}: {error}; it must stream chat completions as OpenAI's do") from None
        except TimeoutError:
            seconds = f"{self._config.timeout:g} seconds"
            raise MachineError(f"{self.url}: no whole answer in {seconds} (--timeout)") from None
        except aiohttp.InvalidURL as error:
            raise EyasError(f"{self.url}: {self._hidden(reason(error))}; it is no address") from None
        except (aiohttp.ClientError, OSError) as error:
            said = self._hidden(reason(error))
            raise MachineError(
                f"{self.url}: {said}; see that a server runs there, and run the same command again"
            ) from None

    async def _timed(
        self, session: aiohttp.ClientSession, messages: Messages, tokens: int, number: int
    ) -> Request:
        request = self._fields | {"messages": messages, "max_tokens": tokens, "seed": number}
        began, first, body, looked = time.perf_counter(), None, bytearray(), 0
        async with session.post(self._chat, json=request, allow_redirects=False) as response:
            if response.status != 200:
                told = self._hidden(read_problem(await _body(response)))
                said = f"{self.url} answers {response.status}: {told or 'nothing'}"
                if may_pass(response.status):
                    raise MachineError(f"{said}; run the same command again when it answers")
                raise EyasError(f"{said}{_ADVICE}")
            async for piece in _pieces(response):
                body += piece
                if first is None:
                    before, looked = looked, body.rfind(b"\n") + 1
                    if _says_something(body[before:looked]):
                        first = time.perf_counter() - began
        whole = time.perf_counter() - began
        answer = read_stream(bytes(body))
        if not answer.tokens:
            raise RubbishError("its stream does not tell the number of tokens (usage)")
        return Request(whole if first is None else first, whole, answer.tokens, _drafts_of(bytes(body)))

    async def _page(self, session: aiohttp.ClientSession, path: str) -> str:
        """Of what not every server has: empty where there is none."""
        try:
            return await self._get(session, path)
        except (aiohttp.ClientError, TimeoutError, RubbishError):
            return ""

    async def _get(self, session: aiohttp.ClientSession, path: str) -> str:
        async with session.get(self._root + path, allow_redirects=False) as response:
            return (await _body(response)).decode(errors="replace") if response.status == 200 else ""

    def _hidden(self, text: str) -> str:
        text = text.replace(self._key, "(the key)") if self._key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


_ADVICE = "; check the address, --served-model and the key in EYAS_API_KEY"


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it comes. RubbishError for one without an end."""
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > LARGEST:
            raise RubbishError(f"the reply has more than {LARGEST >> 20} MiB")
        yield piece


async def _body(response: aiohttp.ClientResponse) -> bytes:
    return b"".join([piece async for piece in _pieces(response)])


def _says_something(body: bytes) -> bool:
    """Whether an event has a piece of the answer, its reasoning or a call."""
    for event in events(body):
        choices = event.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        delta = first.get("delta") if isinstance(first, dict) else None
        if isinstance(delta, dict) and any(value for name, value in delta.items() if name != "role"):
            return True
    return False


def _drafts_of(body: bytes) -> Drafts:
    """What SGLang says of a request's drafts, where it was asked to."""
    for event in reversed([*events(body)]):
        said = event.get("sglext")
        told = said.get("spec_tokens_details") if isinstance(said, dict) else None
        if isinstance(told, dict):
            found = [told.get(name) for name in ("spec_verify_ct", "spec_num_correct_drafts")]
            return Drafts(*(n if type(n) is int and 0 <= n < 2**53 else 0 for n in found))
    return Drafts()


def _figures(done: Sequence[Request], seconds: float, drafts: Drafts) -> dict[str, Any]:
    tokens = sum(one.tokens for one in done)
    found: dict[str, Any] = {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
    for name, values in (("latency", [r.whole for r in done]), ("first_token", [r.first for r in done])):
        median, p90 = np.percentile(values, (50, 90))
        found |= {f"{name}_median_s": float(median), f"{name}_p90_s": float(p90)}
    return found | {"acceptance_length": drafts.length, "accepted_by_position": drafts.rates}


def _prompts(config: BenchServerConfig) -> list[Messages]:
    if not config.data:
        return [[{"role": "user", "content": text}] for text in PROMPTS]
    from dump.clean import Cleaner
    from dump.sources import Sources

    cleaner, sources = Cleaner(questions=True), Sources(config.data)
    wanted = max(config.requests, 2 * max(config.concurrency))
    found = []
    for conversation in sources.conversations(cleaner, lambda n: None, wanted):
        asked = 1 + next(i for i, turn in enumerate(conversation.messages) if turn["role"] == "user")
        found.append([{"role": t["role"], "content": t["content"]} for t in conversation.messages[:asked]])
    if not found:
        raise EyasError(f"{', '.join(config.data)} asks nothing; give conversations")
    return found
