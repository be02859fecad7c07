"""The command that serves a target with a head, for each server: what a head's card and SERVING.md print.

Options were read off the servers' own parsers, at the versions of train/servers.py.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from train.servers import SERVERS, SPECULATORS, Verdict

TOKENS = 3  # drafted a step: a fair start
CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_WIDTH = 100
CPU_OPTIONS = (("--dtype", "float32"), ("--enforce-eager",))
_SGLANG = {"sglang": "sglang.launch_server", "sglang-jax": "sgl_jax.launch_server"}


class Command(NamedTuple):
    """A program with its options, each a tuple with its value, and the environment that it needs."""

    options: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = {}

    def arguments(self) -> list[str]:
        """As a process is started with."""
        return [word for option in self.options for word in option]

    def text(self) -> str:
        """As it is typed, in lines that are not too long."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        first, *others = (" ".join(map(shlex.quote, option)) for option in self.options)
        lines = [" ".join([*variables, first])]
        for option in others:
            if len(lines[-1]) + len(option) < _WIDTH:
                lines[-1] += f" {option}"
            else:
                lines.append(f"    {option}")
        return " \\\n".join(lines)


class Method(NamedTuple):
    """How servers know a kind of head: by entries of vLLM's --speculative-config, beside the folder and the
    number of tokens, and by a name of SGLang's --speculative-algorithm."""

    vllm: Mapping[str, Any]
    sglang: str


class Served(NamedTuple):
    """A head's folder, its layout and the method of its kind (train/heads/head.py: Head.method)."""

    folder: str
    layout: str
    method: Method


def command(
    server: str,
    target: str,
    head: Served | None,
    tokens: int = TOKENS,
    chips: int = 1,
    environment: Mapping[str, str] = {},
) -> Command:
    """How `server` (vllm, tpu-inference, sglang, sglang-jax) serves `target` with `head`, or alone.

    `tokens` are drafted a step, as a chain; the weights are divided over `chips`.
    """
    make = _sglang if server in _SGLANG else _vllm
    return Command(tuple(make(server, target, head, tokens, chips)), environment)


def commands(found: Mapping[str, Verdict], target: str, head: Served) -> list[str]:
    """For each server that takes the head its name, as a comment, and the command."""
    lines = []
    for name in ("vllm", "tpu-inference", "sglang", "sglang-jax"):
        if found[name].taken:
            made = command(name, target, head, environment=found[name].environment)
            lines += [f"# {SERVERS[name].title}", made.text()]
    return lines


def _vllm(_: str, target: str, head: Served | None, tokens: int, chips: int) -> list[tuple[str, ...]]:
    itself = (
        head is not None and head.layout == SPECULATORS
    )  # its config.json names target, method and tokens
    options: list[tuple[str, ...]] = [("vllm", "serve", head.folder if itself else target)]
    if chips > 1:
        options.append(("--tensor-parallel-size", str(chips)))
    if head and not itself:
        how = {**head.method.vllm, "model": head.folder, "num_speculative_tokens": tokens}
        options.append(("--speculative-config", json.dumps(how)))
    return options


def _sglang(server: str, target: str, head: Served | None, tokens: int, chips: int) -> list[tuple[str, ...]]:
    options: list[tuple[str, ...]] = [("python", "-m", _SGLANG[server], "--model-path", target)]
    if chips > 1:
        options.append(("--tp-size", str(chips)))
    if server == "sglang-jax":
        options += [("--device", "tpu"), ("--dtype", "bfloat16"), ("--attention-backend", "fa")]
    if not head:
        return options
    options += [
        ("--speculative-algorithm", head.method.sglang),
        ("--speculative-draft-model-path", head.folder),
        ("--speculative-num-steps", str(tokens)),
        ("--speculative-eagle-topk", "1"),
        ("--speculative-num-draft-tokens", str(tokens + 1)),
    ]
    if server == "sglang-jax":
        options += [("--page-size", "64"), ("--disable-overlap-schedule",)]
    return options
