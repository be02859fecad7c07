"""A server that answers as OpenAI's chat completions do: vLLM, SGLang, sglang-jax, a hosted one.

While it is not known to work, at the start and after a failure, requests begin one by one: the next one when
one was answered, when the time to wait is over, or after some seconds, since answers may take minutes. As
soon as one is answered, as many as it may have are in flight. So a server that is being started, or limits
its rate, is asked gently, and a wrong key is sent once.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from common.errors import EyasError
from common.library_errors import reason
from common.progress import note
from pipelines.regenerate.answerer import Answer, GoneError, Messages, RejectedError, TryAgainError
from pipelines.regenerate.config import RegenerateConfig, completions_url
from pipelines.regenerate.reply import RubbishError, read_problem, read_reply, read_stream

KEY = "EYAS_API_KEY"  # of all endpoints; EYAS_API_KEY_2: of the second one
_FIRST, _LONGEST = 1.0, 60.0  # seconds of back-off
_STAGGER = 5.0  # seconds between requests to a server that is not known to work
_CONNECT = 30.0  # seconds
_RUBBISH = 8  # replies of a server that has answered nothing, until it is taken for one of another kind
_TOLD_AGAIN = 60.0  # seconds between two notes of one server
_SECRET = 8  # characters of a key that is one, and no word for servers that want any
LARGEST = 64 << 20  # bytes of a reply
_PLAIN = [{"role": "user", "content": "Hello"}]
_REJECTED = (400, 413, 422)
_PASSING = (408, 409, 425, 429)
_ADVICE = {
    401: f"give its key in {KEY}",
    403: f"give a key that may in {KEY}",
    404: "check the address, which often ends in /v1, and --served-model",
}


def key_of(number: int, *recorded: str | None) -> str | None:
    """The key of the `number`-th endpoint, from 1. EyasError if it is none, or stands in what is recorded."""
    name = f"{KEY}_{number}" if os.environ.get(f"{KEY}_{number}") else KEY
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable():
        raise EyasError(f"the environment's {name} holds characters that no key has; set it anew")
    if len(key) >= _SECRET and any(key in text for text in recorded if text):
        raise EyasError(
            f"the key in {name} is also part of an address, --served-model or --extra, which are shown and "
            "recorded; leave it out there: it is sent as a header"
        )
    return key or None


class Endpoint:
    """An `Answerer`; its connections are open within `async with`."""

    def __init__(self, url: str, key: str | None, config: RegenerateConfig) -> None:
        self.name, self.width = url.rstrip("/"), config.concurrency
        self._url, self._key = completions_url(url), key
        how = (
            {"stream": True, "stream_options": {"include_usage": True}}
            if config.stream
            else {"stream": False}
        )
        self._fields = config.fields() | how
        self._timeout, self._patience = config.timeout, config.patience
        self._works = asyncio.Event()
        self._next = 0.0  # when, of the monotonic clock, the next request begins while it does not work
        self._resume = 0.0  # when it lets itself be asked again
        self._delay, self._delayed = 0.0, 0.0  # seconds of back-off, and when they were set
        self._failing: float | None = None  # since when
        self._told = -_TOLD_AGAIN
        self._answered = self._rubbish = 0
        self._gone: GoneError | None = None

    async def __aenter__(self) -> Self:
        address = urlsplit(self._url)
        is_here = address.hostname in ("localhost", "127.0.0.1", "::1")
        if self._key and address.scheme == "http" and not is_here:
            note(f"{self.name}: the key goes there unencrypted, since the address begins with http://")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),  # vLLM closes after 5
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=_CONNECT),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=not is_here,  # proxies
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ready(self) -> None:
        """Waits until a request may begin. GoneError if the server is given up."""
        while True:
            if self._gone:
                raise self._gone
            works, now = self._works.is_set(), time.monotonic()
            wait = max(self._resume, 0.0 if works else self._next) - now
            if wait <= 0:
                break
            if works:
                await asyncio.sleep(wait)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._works.wait()
        if not works:
            self._next = now + _STAGGER

    async def answer(self, messages: Messages, tools: list[dict[str, Any]], seed: int) -> Answer:
        """Asks once."""
        if self._gone:
            raise self._gone
        request = self._fields | {"messages": messages, "seed": seed} | ({"tools": tools} if tools else {})
        began, before = time.monotonic(), self._answered
        try:
            status, headers, body = await self._post(request)
            if status == 200:
                found = (read_stream if _is_stream(headers) else read_reply)(body)
                self._answered += 1
                self._is_up()
                return found
        except RubbishError as error:
            raise self._not_an_answer(str(error), began, before) from None
        except aiohttp.InvalidURL as error:
            raise self._give_up(f"{self._told_by(reason(error))}: it is no address", mistake=True) from None
        except aiohttp.ClientSSLError as error:
            said = f"{self._told_by(reason(error))}: it speaks no https, or its certificate is not valid"
            raise self._give_up(said, mistake=True) from None
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as error:
            raise self._failed(self._reason(error), began, before) from None
        text = self._told_by(read_problem(body))
        said = f"{status}: {text}" if text else f"status {status}"
        if status in _REJECTED:
            await self._require_plain_answer(request, said)
            raise RejectedError(said)
        if may_pass(status):
            raise self._failed(said, began, before, _seconds(headers.get("Retry-After")))
        raise self._give_up(f"{said}; {_ADVICE.get(status, 'check the address')}", mistake=True)

    async def _post(self, request: dict[str, Any]) -> tuple[int, Any, bytes]:
        data = json.dumps(request).encode()
        kind = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=data, headers=kind, allow_redirects=False) as response:
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > LARGEST:
                    raise RubbishError(f"the reply has more than {LARGEST >> 20} MiB")
            return response.status, response.headers, bytes(body)

    async def _require_plain_answer(self, request: dict[str, Any], said: str) -> None:
        """Whether a rejection is due to the question or to the server; GoneError if it answers nothing."""
        if request["messages"] is _PLAIN:
            raise self._give_up(f"it rejects a plain question too ({said})", mistake=True)
        if not self._answered:
            await self.answer(_PLAIN, [], 0)
        self._is_up()

    def _is_up(self) -> None:
        self._failing, self._delay = None, 0.0
        self._works.set()

    def _not_an_answer(self, said: str, began: float, before: int) -> Exception:
        self._rubbish += 1
        if self._rubbish >= _RUBBISH and not self._answered:
            return self._give_up(f"none of {self._rubbish} replies was an answer ({said})", mistake=True)
        return self._failed(said, began, before)

    def _failed(self, said: str, began: float, before: int, wait: float | None = None) -> Exception:
        """What is to be raised for a failure that may pass."""
        now = time.monotonic()
        if self._failing is None:
            self._failing = now
        if now - self._told > _TOLD_AGAIN:
            self._told = now
            note(f"{self.name}: {said}; trying on for up to {self._patience:g} seconds")
        if now - self._failing > self._patience:
            return self._give_up(f"nothing answered for {now - self._failing:.0f} seconds ({said})")
        if wait is not None and wait > self._patience:
            return self._give_up(f"it asks to wait {wait:.0f} seconds, longer than --patience ({said})")
        if wait is not None:
            self._resume = max(self._resume, now + wait)
        if began >= self._delayed:  # not one of many that fail together
            self._delayed = now
            self._delay = min(_LONGEST, max(_FIRST, 2 * self._delay))
            self._next = now + self._delay * random.uniform(0.5, 1.0)
        self._works.clear()
        return TryAgainError(said, alone=self._answered > before)

    def _give_up(self, said: str, mistake: bool = False) -> GoneError:
        if self._gone is None:
            self._gone = GoneError(said, mistake)
            self._works.set()  # wakes who waits
        return self._gone

    def _reason(self, error: Exception) -> str:
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return f"no connection in {_CONNECT:g} seconds"
        if isinstance(error, TimeoutError):
            return f"no whole answer in {self._timeout:g} seconds (--timeout)"
        if isinstance(error, aiohttp.ClientPayloadError):
            return "the reply was cut off or is damaged"
        return self._told_by(reason(error))

    def _told_by(self, text: str) -> str:
        """What a server says, on one short line, without the key, which some repeat."""
        text = text.replace(self._key, "(the key)") if self._key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def may_pass(status: int) -> bool:
    """Whether a server that answers so may answer well some time later."""
    return status in _PASSING or (status >= 500 and status not in (501, 505))


def _is_stream(headers: Any) -> bool:
    return headers.get("Content-Type", "").lower().startswith("text/event-stream")


def _seconds(text: str | None) -> float | None:
    """What a Retry-After asks for: seconds, or a date."""
    if text is None:
        return None
    with suppress(ValueError):
        return max(0.0, min(float(text), 1e9))
    with suppress(ValueError, OverflowError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None
