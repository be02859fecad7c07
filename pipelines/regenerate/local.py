"""The target answers on this machine's first device: for small targets, and where there is no server."""

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Self

from common.config import digest
from common.errors import EyasError
from common.layers import compute_dtype
from common.progress import note
from common.safetensors import Checkpoint
from dump import target
from dump.answer_spans import THINK
from dump.chat import Chat
from dump.plan import weights_hash
from dump.template import TemplateRefusedError
from pipelines.decoding.answering import Answer, Answering
from pipelines.decoding.engine import Engine, on_one_device, require_length
from pipelines.decoding.sampling import Sampling
from pipelines.regenerate.answerer import Answer as Reply
from pipelines.regenerate.answerer import Messages, RejectedError
from pipelines.regenerate.config import RegenerateConfig
from pipelines.regenerate.reply import judged

LARGEST = 2_000_000_000  # parameters: with more, a server answers many times as fast
_SERVERS = "serve it (vllm serve, python -m sglang.launch_server, sglang-jax) and give --endpoint"


@dataclass(eq=False)
class _Asked(Answer):
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Local:
    """An `Answerer` that decodes by itself; the target is in memory within `async with`."""

    def __init__(self, config: RegenerateConfig) -> None:
        """Reads no weights. EyasError for a target that is damaged, unsupported, or too large for this."""
        folder = config.model
        self.name, self.width = f"the target {folder}", config.slots
        self._folder, self._max_tokens, self._length = folder, config.max_tokens, config.length
        self._target = require_small(folder, config.length)
        target.check(folder, self._target)
        self._chat = Chat.load(folder)
        self._sampling = Sampling(config.temperature or 0.0, config.top_p, config.top_k)
        self._dtype = compute_dtype(None)
        self._waiting: deque[_Asked] = deque()
        self._changed = asyncio.Event()

    def described(self) -> dict[str, Any]:
        """All that decides about its answers besides what they were asked."""
        return {
            "config_hash": digest(self._target.raw),
            "weights_hash": weights_hash(Checkpoint.open(self._folder)),
            "tokenizer_hash": self._chat.tokenizer_hash,
            "template_hash": self._chat.template_hash,
            "length": self._length,
            "dtype": self._dtype,
        }

    async def __aenter__(self) -> Self:
        weights = on_one_device(self._folder, self._target, self._dtype)
        engine = Engine(self._target, weights, self.width, self._length, self._sampling)
        self._answering = Answering(engine, self._chat.stops)
        note(f"{self.name} answers {self.width} conversations at once; the first steps are compiled")
        self._serving = asyncio.ensure_future(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)

    async def ready(self) -> None:
        """Always."""

    async def answer(self, messages: Messages, tools: list[dict[str, Any]], seed: int) -> Reply:
        """RejectedError for messages with tools, whose calls only servers read, or that are too long."""
        prompt = self._prompt(messages, tools)
        asked = _Asked(prompt, seed, min(self._max_tokens, self._length - len(prompt)))
        self._waiting.append(asked)
        self._changed.set()
        waiting = asyncio.ensure_future(asked.ended.wait())
        await asyncio.wait((waiting, self._serving), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            self._serving.result()  # raises what has ended it
        thinking = f"{THINK}\n" if self._chat.opens_thought else ""
        text = thinking + self._chat.decode(asked.tokens, special=False)
        return judged({"content": text}, asked.finish, asked.given)

    def _prompt(self, messages: Messages, tools: list[dict[str, Any]]) -> list[int]:
        if tools:
            raise RejectedError("it defines tools, whose calls only a server reads (--endpoint)")
        if self._chat.holds_special(messages):
            raise RejectedError("a text spells a special token")
        try:
            prompt = self._chat.prompt(messages)
        except TemplateRefusedError as error:
            raise RejectedError(f"the chat template refuses it: {error}") from None
        if len(prompt) >= self._length:
            raise RejectedError(f"it has {len(prompt)} tokens and --length is {self._length}")
        return prompt

    async def _serve(self) -> None:
        """Steps as long as there are answers to grow; what waits takes a slot as soon as one is free."""
        while True:
            while not self._answering.busy and not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            ended = []
            while self._waiting and self._answering.free:
                asked = self._waiting.popleft()
                if await asyncio.to_thread(self._answering.begin, asked):
                    ended.append(asked)
            if self._answering.busy:
                ended += await asyncio.to_thread(self._answering.step)
            for asked in ended:
                asked.ended.set()
            await asyncio.sleep(0)  # who was answered asks the next question


def require_small(folder: str, length: int) -> target.TargetConfig:
    """The target of a folder, whose weights need not be there.

    EyasError if it is too large to answer here, or made for conversations of less than `length` tokens.
    """
    cfg = target.read_config(folder)
    size = sum(math.prod(p.shape) for p in target.parameters(cfg).values())
    if size > LARGEST:
        raise EyasError(
            f"{folder} has {size / 1e9:.1f} billion parameters, too many to answer here (at most "
            f"{LARGEST / 1e9:g}); {_SERVERS}"
        )
    require_length(cfg, folder, length)
    return cfg
