"""Prompts as token ids, answered greedily by a server that answers as vLLM's completions do."""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from common import strict_json
from common.errors import EyasError, MachineError
from common.library_errors import reason
from common.progress import Progress
from pipelines.regenerate.endpoint import may_pass
from pipelines.regenerate.reply import read_problem
from pipelines.serving import counters
from pipelines.serving.server import Server

Tokens = list[int]


def answers(
    server: Server, model: str, prompts: Sequence[Tokens], tokens: int, concurrency: int, timeout: float
) -> tuple[list[Tokens], counters.Drafts | None]:
    """(the answers' tokens, up to `tokens` each, the drafts meanwhile; None where the server drafts nothing).

    MachineError, with the server's last words if it has ended, for what goes wrong.
    """
    try:
        return asyncio.run(_answers(server.url, model, prompts, tokens, concurrency, timeout))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        server.require_running()
        late = f"no answer in {timeout:g} seconds (--timeout)"
        said = late if isinstance(error, TimeoutError) else reason(error)
        raise MachineError(f"{server.url}: {said}; its log is {server.log}") from None


async def _answers(
    url: str, model: str, prompts: Sequence[Tokens], tokens: int, concurrency: int, timeout: float
) -> tuple[list[Tokens], counters.Drafts | None]:
    free = asyncio.Semaphore(concurrency)
    limit = aiohttp.ClientTimeout(total=timeout)
    with Progress("answers", len(prompts), "answer") as progress:
        async with aiohttp.ClientSession(timeout=limit, trust_env=False) as session:

            async def one(prompt: Tokens) -> Tokens:
                async with free:
                    found = await _complete(session, url, model, prompt, tokens)
                    progress.update(1)
                    return found

            before = counters.read(await _page(session, f"{url}/metrics"))
            found = await asyncio.gather(*(one(prompt) for prompt in prompts))
            after = counters.read(await _page(session, f"{url}/metrics"))
    drafts = after.since(before or counters.Drafts()) if after else None
    return list(found), drafts


async def _page(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        return (await response.read()).decode(errors="replace")


async def _complete(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Tokens, tokens: int
) -> Tokens:
    request = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    async with session.post(f"{url}/v1/completions", json=request | {"return_token_ids": True}) as response:
        body = await response.read()
        if response.status != 200:
            kind = MachineError if may_pass(response.status) else EyasError
            raise kind(f"{url} answers {response.status}: {read_problem(body)[:200] or 'nothing'}")
    return _tokens(strict_json.parse(body, f"the reply of {url}"), url)


def _tokens(reply: Any, url: str) -> Tokens:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    found = first.get("token_ids") if isinstance(first, dict) else None
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise EyasError(f"{url} gives no token_ids; it is no vLLM that knows return_token_ids")
    return found
