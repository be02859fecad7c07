"""What a server tells of the drafts that it has accepted: differences of two snapshots, not a life's average.

vLLM, tpu-inference: counters at /metrics (Prometheus's text). SGLang tells averages alone.
"""

import re
from typing import NamedTuple

_COUNTER = re.compile(
    r"^vllm:spec_decode_num_(drafts|accepted_tokens|accepted_tokens_per_pos)_total(?:\{(.*)\})? (\S+)$"
)
_POSITION = re.compile(r'position="(\d+)"')


class Drafts(NamedTuple):
    """How many drafts there were, and how many of their tokens were accepted, in all and by position."""

    drafts: float = 0.0
    accepted: float = 0.0
    by_position: tuple[float, ...] = ()

    def since(self, before: "Drafts") -> "Drafts":
        """What came behind an earlier snapshot."""
        earlier = before.by_position + (0.0,) * (len(self.by_position) - len(before.by_position))
        parts = tuple(now - then for now, then in zip(self.by_position, earlier, strict=True))
        return Drafts(self.drafts - before.drafts, self.accepted - before.accepted, parts)

    @property
    def length(self) -> float | None:
        """Tokens a step of the target, its own token counted; None where nothing was drafted."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    @property
    def rates(self) -> list[float]:
        """Accepted tokens a draft, by position."""
        return [part / self.drafts for part in self.by_position] if self.drafts else []


def read(text: str) -> Drafts | None:
    """The counters of a page of metrics, those of several engines added up; None if it has none."""
    drafts = accepted = 0.0
    positions: dict[int, float] = {}
    found = False
    for line in text.splitlines():
        match = _COUNTER.match(line)
        if not match:
            continue
        found, (name, labels, value) = True, match.groups()
        if name == "drafts":
            drafts += float(value)
        elif name == "accepted_tokens":
            accepted += float(value)
        elif place := _POSITION.search(labels or ""):
            positions[int(place[1])] = positions.get(int(place[1]), 0.0) + float(value)
    by_position = tuple(positions.get(p, 0.0) for p in range(max(positions, default=-1) + 1))
    return Drafts(drafts, accepted, by_position) if found else None
