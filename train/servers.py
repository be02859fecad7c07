"""The servers that heads are exported for, the layouts that each loads, and what it makes of a head.

All was read off their loaders at the versions named here; tests/train/loaders compares what runs on a CPU.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from common.errors import EyasError

PORTABLE, SPECULATORS, TPU = "portable", "speculators", "tpu-inference"
LAYOUTS = {
    PORTABLE: "for SGLang, sglang-jax, EAGLE's own code and vLLM",
    SPECULATORS: "for vLLM, which then finds the target by itself, and the package speculators",
    TPU: "for the JAX models of tpu-inference, vLLM's backend for TPU",
}
TORCH_PATH = {
    "MODEL_IMPL_TYPE": "vllm",
    "DRAFT_MODEL_IMPL_TYPE": "vllm",
}  # of tpu-inference: vLLM's own models


class Server(NamedTuple):
    """`layouts` are those that it loads, `version` is that of the loader which was read."""

    title: str
    version: str
    layouts: tuple[str, ...]


SERVERS = {
    "vllm": Server("vLLM", "0.32", (PORTABLE, SPECULATORS, TPU)),
    "sglang": Server("SGLang", "0.5.23", (PORTABLE,)),
    "sglang-jax": Server("sglang-jax", "cddbf6f", (PORTABLE, TPU)),
    "tpu-inference": Server("tpu-inference", "0.32", (TPU, PORTABLE, SPECULATORS)),
    "speculators": Server("speculators", "0.9", (SPECULATORS,)),
    "eagle": Server("EAGLE's own code", "cb7e084", (PORTABLE, TPU)),
}


class Limit(NamedTuple):
    """Something about a head that these servers, keys of SERVERS, would refuse or read as something else.

    Those of "tpu-inference" are of its JAX models.
    """

    what: str
    servers: tuple[str, ...]


class Verdict(NamedTuple):
    """What a server makes of a head in a layout: `taken` or not; `why` not, or what to mind, if anything.

    `advice` is what helps; `environment` are variables that it needs to be started with.
    """

    taken: bool
    why: str = ""
    advice: str = ""
    environment: Mapping[str, str] = {}

    def text(self) -> str:
        """In a few words."""
        if not self.taken:
            return f"no: it cannot take {self.why}" + (f"; {self.advice}" if self.advice else "")
        return f"loads, but {self.why}" if self.why else "loads"


def verdicts(limits: Iterable[Limit], layout: str) -> dict[str, Verdict]:
    """What each server makes of a folder in `layout` that holds a head with these limits."""
    limits = list(limits)
    found = {name: _verdict(name, limits, layout) for name in SERVERS}
    jax, torch = found["tpu-inference"], found["vllm"]
    if not jax.taken or layout != TPU:
        settings = " ".join(f"{name}={value}" for name, value in TORCH_PATH.items())
        reason = jax.why if jax.why else f"it; --layout {TPU} is for those"
        why = f"only with {settings}: its JAX models cannot take {reason}"
        found["tpu-inference"] = Verdict(True, why, environment=TORCH_PATH) if torch.taken else torch
    return found


def _verdict(name: str, limits: list[Limit], layout: str) -> Verdict:
    if layout not in SERVERS[name].layouts:
        wanted = SERVERS[name].layouts[0]
        return Verdict(False, f"the layout {layout}", f"export it with --layout {wanted}")
    reasons = [limit.what for limit in limits if name in limit.servers]
    if reasons:
        return Verdict(False, "; ".join(reasons))
    if name == "eagle":
        return Verdict(
            True, "wants transformers 4, and model.safetensors.index.json beside the target's weights"
        )
    return Verdict(True)


def best(limits: Iterable[Limit]) -> dict[str, Verdict]:
    """What each server makes of a head in the layout that suits it best."""
    limits = list(limits)
    return {name: verdicts(limits, server.layouts[0])[name] for name, server in SERVERS.items()}


def sentences(limits: Iterable[Limit]) -> list[str]:
    """Who cannot take a head in any layout, and why, a line each."""
    return [
        f"{SERVERS[name].title} cannot take {verdict.why}"
        for name, verdict in best(limits).items()
        if not verdict.taken
    ]


def require(found: Mapping[str, Verdict], wanted: Iterable[str], where: str) -> None:
    """EyasError for the first of the servers `wanted` that cannot take the head at `where`."""
    for name in wanted:
        if not found[name].taken:
            advice = found[name].advice or "train a head without it, or serve it elsewhere"
            raise EyasError(f"{where}: {SERVERS[name].title} cannot take {found[name].why}; {advice}")


def table(found: Mapping[str, Verdict]) -> list[str]:
    """A line a server, for a terminal."""
    titles = {name: f"{SERVERS[name].title} {SERVERS[name].version}" for name in found}
    width = max(map(len, titles.values()))
    return [f"{titles[name]:<{width}}  {verdict.text()}" for name, verdict in found.items()]
