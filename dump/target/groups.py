"""Equal layers are computed by one scan: a model is a few groups, and a group is a period that repeats."""

from dataclasses import dataclass

from dump.target.spec import Layer

_LONGEST = 8  # layers of a period; published hybrids have 1, 2, 4 or 6


@dataclass(frozen=True)
class Group:
    """`repeats` times the layers of `period`, from layer `first` on."""

    first: int
    period: tuple[Layer, ...]
    repeats: int

    def layers_at(self, place: int) -> list[int]:
        """The model's layers that stand at one place of the period, in order."""
        step = len(self.period)
        return [self.first + place + step * r for r in range(self.repeats)]


def group(layers: tuple[Layer, ...]) -> list[Group]:
    """Cuts layers into groups, each as long as it can be: [D, D, D, M, M] gives D x 3, M x 2."""
    groups: list[Group] = []
    first = 0
    while first < len(layers):
        sizes = range(1, min(_LONGEST, len(layers) - first) + 1)
        counted = [(_repeats(layers, first, size), size) for size in sizes]
        repeats, size = max(
            ((r, s) for r, s in counted if r > 1 or s == 1),
            key=lambda found: (found[0] * found[1], -found[1]),
        )
        groups.append(Group(first, layers[first : first + size], repeats))
        first += repeats * size
    return groups


def _repeats(layers: tuple[Layer, ...], first: int, size: int) -> int:
    period = layers[first : first + size]
    repeats = 1
    while layers[first + repeats * size : first + (repeats + 1) * size] == period:
        repeats += 1
    return repeats
