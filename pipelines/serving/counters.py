"""What a server tells of the drafts that it has accepted: differences of two snapshots, not a life's average.

vLLM, tpu-inference: counters at /metrics (Prometheus's text). SGLang tells averages alone.
"""

import re
from typing import NamedTuple

_COUNTER = re.compile(
    r"^vllm:spec_decode_num_(drafts|accepted_tokens|accepted_tokens_per_pos)_total(?:\{(.*)\})? (\S+)$"
)
_MOST = 1e18  # of a counter: what is larger, or infinite, was not counted
_POSITION = re.compile(r'position="(\d{1,3})"')


class Drafts(NamedTuple):
    """How many drafts there were, and how many of their tokens were accepted, in all and by position."""

    drafts: float = 0.0
    accepted: float = 0.0
    by_position: tuple[float, ...] = ()

    def since(self, before: "Drafts") -> "Drafts":
        """What came behind an earlier snapshot; nothing where the counters went back, of a server that was
        started anew meanwhile."""
        earlier = before.by_position + (0.0,) * (len(self.by_position) - len(before.by_position))
        parts = tuple(now - then for now, then in zip(self.by_position, earlier, strict=True))
        found = Drafts(self.drafts - before.drafts, self.accepted - before.accepted, parts)
        return Drafts() if min(found.drafts, found.accepted, *parts) < 0 else found

    @property
    def length(self) -> float | None:
        """Tokens a step of the target, its own token counted; None where nothing was drafted."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    @property
    def rates(self) -> list[float]:
        """Accepted tokens a draft, by position."""
        return [part / self.drafts for part in self.by_position] if self.drafts else []


def read(text: str) -> Drafts | None:
    """The counters of a page of metrics, those of several engines added up; None if it has none. What is no
    number is left out."""
    drafts = accepted = 0.0
    positions: dict[int, float] = {}
    found = False
    for line in text.splitlines():
        match = _COUNTER.match(line)
        value = _number(match[3]) if match else None
        if not match or value is None:
            continue
        found, name = True, match[1]
        if name == "drafts":
            drafts += value
        elif name == "accepted_tokens":
            accepted += value
        elif place := _POSITION.search(match[2] or ""):
            positions[int(place[1])] = positions.get(int(place[1]), 0.0) + value
    by_position = tuple(positions.get(p, 0.0) for p in range(max(positions, default=-1) + 1))
    return Drafts(drafts, accepted, by_position) if found else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < _MOST else None
