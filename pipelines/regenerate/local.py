"""The target answers on this machine's first device: for small targets, and where there is no server."""

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp

from common.config import digest
from common.errors import EyasError
from common.layers import compute_dtype
from common.mesh import make_mesh
from common.progress import note
from common.safetensors import Checkpoint
from dump import target
from dump.answer_spans import THINK
from dump.chat import Chat
from dump.plan import positions_limit, weights_hash
from dump.template import TemplateRefusedError
from pipelines.decoding.engine import Engine
from pipelines.decoding.sampling import Sampling
from pipelines.regenerate.answerer import Answer, Messages, RejectedError
from pipelines.regenerate.config import RegenerateConfig
from pipelines.regenerate.reply import judged

LARGEST = 2_000_000_000  # parameters: with more, a server answers many times as fast
_SERVERS = "serve it (vllm serve, python -m sglang.launch_server, sglang-jax) and give --endpoint"


@dataclass
class _Asked:
    prompt: list[int]
    seed: int
    answered: asyncio.Future[str]  # why it ended
    tokens: list[int]


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
        self._active: dict[int, _Asked] = {}
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
        loaded = target.load(self._folder, self._target, make_mesh(), jnp.dtype(self._dtype))
        weights = {name: x.addressable_data(0) for name, x in loaded.items()}
        self._engine = Engine(self._target, weights, self.width, self._length, self._sampling)
        note(f"{self.name} answers {self.width} conversations at once; the first steps are compiled")
        self._serving = asyncio.ensure_future(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)

    async def ready(self) -> None:
        """Always."""

    async def answer(self, messages: Messages, tools: list[dict[str, Any]], seed: int) -> Answer:
        """RejectedError for messages with tools, whose calls only servers read, or that are too long."""
        asked = _Asked(self._prompt(messages, tools), seed, asyncio.get_running_loop().create_future(), [])
        self._waiting.append(asked)
        self._changed.set()
        await asyncio.wait((asked.answered, self._serving), return_when=asyncio.FIRST_COMPLETED)
        if not asked.answered.done():
            self._serving.result()  # raises what has ended it
        finish = asked.answered.result()
        thinking = f"{THINK}\n" if self._chat.opens_thought else ""
        text = thinking + self._chat.decode(asked.tokens, special=False)
        return judged({"content": text}, finish, len(asked.tokens) + (finish == "stop"))

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
            while not self._active and not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            while self._waiting and self._engine.free:
                asked = self._waiting.popleft()
                slot, token = await asyncio.to_thread(self._engine.begin, asked.prompt, asked.seed)
                self._active[slot] = asked
                self._take(slot, token)
            if self._active:
                tokens, _ = await asyncio.to_thread(self._engine.step)
                for slot in list(self._active):
                    self._take(slot, int(tokens[slot, 0]))
            await asyncio.sleep(0)  # who was answered asks the next question

    def _take(self, slot: int, token: int) -> None:
        """One more token of the answer in a slot, which may end it."""
        asked = self._active[slot]
        if token in self._chat.stops:
            finish = "stop"
        else:
            asked.tokens.append(token)
            room = min(self._max_tokens, self._length - len(asked.prompt))
            if len(asked.tokens) < room:
                return
            finish = "length"
        self._engine.end(slot)
        del self._active[slot]
        if not asked.answered.done():
            asked.answered.set_result(finish)


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
    limit = min(n for n in (positions_limit(cfg.text), cfg.max_length, length) if n is not None)
    if limit < length:
        raise EyasError(f"length={length}, but {folder} is made for {limit} tokens; give --length {limit}")
    return cfg
