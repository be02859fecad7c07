"""What can be chosen about regenerating answers."""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from common import strict_json
from common.config import check, given, setting

_OURS = (
    *("messages", "model", "max_tokens", "n", "seed", "stream", "stream_options", "temperature"),
    *("tools", "top_k", "top_p"),
)
_KEY = re.compile(
    r'"([^"]*(?:api[-_]?key|authorization|password|secret|bearer|access[-_]?token)[^"]*)"\s*:', re.I
)
_OF_SERVERS = ("served_model", "extra", "stream", "concurrency", "timeout", "patience")
_OF_MODEL = ("slots", "length")


@dataclass(frozen=True)
class RegenerateConfig:
    """Which questions to ask whom: servers, or the target on this machine. `data`: files or URLs; `out`: a
    local .jsonl file."""

    data: tuple[str, ...]
    out: str
    endpoint: tuple[str, ...] | None = setting(
        None,
        "The address of a server that answers as OpenAI's chat completions do, http://HOST:8000/v1; may be "
        "repeated. Keys are given by the environment: EYAS_API_KEY, or EYAS_API_KEY_2 of the second one.",
        otherwise="--model answers",
    )
    served_model: str | None = setting(None, "The target's name at the endpoints.", otherwise="none")
    model: str | None = setting(
        None,
        "A small target that answers on this machine, without a server: a recipe (see `eyas targets`), a "
        "Hugging Face folder, a gs:// prefix or a Hub id.",
        otherwise="--endpoint answers",
    )
    max_tokens: int = setting(4096, "Most tokens of an answer, its reasoning included.", least=1)
    truncated: str = setting(
        "drop",
        "What becomes of an answer that has more; in either case its conversation ends there.",
        choices=("drop", "keep"),
    )
    temperature: float | None = setting(
        None, "0 is greedy.", least=0, otherwise="the server's; that of --model is 0"
    )
    top_p: float | None = setting(
        None, "Sample from the likeliest tokens of this mass.", above=0, most=1, otherwise="the server's"
    )
    top_k: int | None = setting(
        None, "Sample from so many tokens; vLLM and SGLang know it.", least=1, otherwise="the server's"
    )
    extra: str | None = setting(
        None,
        'More fields of every request, as JSON: {"chat_template_kwargs": {"enable_thinking": false}}.',
        otherwise="none",
    )
    seed: int = setting(0, "Gives each answer its own seed, which the server is told.", least=0)
    max_conversations: int | None = setting(
        None, "Stop reading after so many conversations.", least=1, otherwise="all"
    )
    slots: int = setting(8, "Conversations that --model answers at once.", least=1, most=1024)
    length: int = setting(2048, "Tokens of a conversation that --model answers, at most.", least=2)
    concurrency: int = setting(64, "Requests in flight at each endpoint.", least=1, most=4096)
    stream: bool = setting(
        False, "Have answers sent piece by piece: for gateways that cut what is silent for a minute."
    )
    timeout: float = setting(600.0, "Seconds for an answer to be complete.", above=0)
    patience: float = setting(
        900.0, "Seconds that an endpoint may fail, or ask to wait, before it is given up.", above=0
    )

    def __post_init__(self) -> None:
        # First, as `check` repeats values, and an endpoint may hold a secret.
        for name in ("data", "endpoint"):
            value = getattr(self, name)
            if name == "endpoint" and value is None:
                continue
            if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value or [0]):
                raise ValueError(f"{name} must be a tuple of at least one text")
        check(self)
        self._require_who_answers()
        endpoints = self.endpoint or ()
        for number, url in enumerate(endpoints, 1):
            require_plain(url, number)
        if len({completions_url(url) for url in endpoints}) < len(endpoints):
            raise ValueError("an endpoint is named twice; --concurrency asks one more at a time")
        if not self.out.endswith((".jsonl", ".ndjson")):
            raise ValueError(f"out={self.out!r} must be a file whose name ends in .jsonl")
        if "://" in self.out.removeprefix("file://"):
            raise ValueError(
                f"out={self.out!r} must be a local file, which grows by lines; copy it when it is complete"
            )
        self.fields()

    def _require_who_answers(self) -> None:
        if self.endpoint and self.model:
            raise ValueError(f"endpoint and model={self.model!r} are given; one of the two answers")
        if not self.endpoint and not self.model:
            raise ValueError(
                "nobody answers: give --endpoint and --served-model, or --model for a small target"
            )
        if self.endpoint and not self.served_model:
            raise ValueError("endpoint needs the target's name there: give --served-model")
        for name in given(self, _OF_SERVERS) if self.model else ():
            raise ValueError(f"{name} is for servers, and model={self.model!r} answers by itself; leave it")
        for name in given(self, _OF_MODEL) if self.endpoint else ():
            raise ValueError(f"{name} is for a model that answers here; servers have their own: leave it")
        for name in given(self, ("top_p", "top_k")) if self.model and not self.temperature else ():
            raise ValueError(f"{name} has no meaning at temperature 0, which is greedy; give --temperature")

    def fields(self) -> dict[str, Any]:
        """The fields of every request but messages, tools and seed."""
        names = "max_tokens", "temperature", "top_p", "top_k"
        asked = {"model": self.served_model} | {name: getattr(self, name) for name in names}
        return {k: v for k, v in asked.items() if v is not None} | self._extra()

    def _extra(self) -> dict[str, Any]:
        key = _KEY.search(self.extra or "")
        if key:  # what is asked is recorded, and so said without the value
            raise ValueError(
                f"extra must not have {key[1]}: keys are given by EYAS_API_KEY, and never recorded"
            )
        try:
            value = strict_json.parse((self.extra or "{}").encode(), "extra")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"extra={self.extra!r} must be an object of JSON")
        ours = [name for name in _OURS if name in value]
        if ours:
            raise ValueError(f"extra={self.extra!r} must not have {ours[0]}, which has an option or is set")
        return value


def completions_url(url: str) -> str:
    """Where an endpoint is asked: `/v1` where its URL has no path."""
    base = url.rstrip("/").removesuffix("/chat/completions")
    return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"


def require_plain(url: str, number: int) -> None:
    """ValueError unless `url` is an http address; it may hold a secret, so it is not told."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        (parts.hostname or "").encode("idna")  # else who looks the name up raises what is no OSError
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise ValueError(f"endpoint {number} must be an address such as http://localhost:8000/v1")
    if any(sign in url for sign in "@?#"):
        raise ValueError(
            f"endpoint {number} must be an address without user, password, ? and #; a key is given by the "
            "environment variable EYAS_API_KEY"
        )
