"""The matmuls of a program compiled for CPUs, read off its optimised HLO with every loop counted out."""

import re
from dataclasses import dataclass

from pipelines.bench.hlo import computations_of

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_COMMENTS = re.compile(r"/\*.*?\*/|(?<=\])\{[^}]*\}")  # and layouts


@dataclass(frozen=True)
class Matmul:
    """`name`: what the program calls it; `flops` in all runs; `unknown`: whether it is in a loop whose length
    the program does not say, of which one run is counted."""

    name: str
    flops: float
    unknown: bool = False


def matmuls(text: str) -> list[Matmul]:
    """Those of a program, given as the text of its optimised HLO; of a `conditional` all branches."""
    computations, entry = computations_of(text)
    shapes = {m[1]: m[2] for m in map(_INSTRUCTION.match, _COMMENTS.sub("", text).splitlines()) if m}
    known: dict[str, list[Matmul]] = {}

    def of(name: str) -> list[Matmul]:
        if name not in known:
            known[name] = [one for line in computations.get(name, ()) for one in found(line)]
        return known[name]

    def found(line: str) -> list[Matmul]:
        plain = _COMMENTS.sub("", line)
        head = _INSTRUCTION.match(plain)
        if head and head[3] == "dot":
            called = re.search(r'op_name="([^"]*)"', line)
            return [Matmul(called[1] if called else "", _dot_flops(head[2], plain, shapes))]
        if head and head[3] == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            body, runs = of(re.search(r"body=%?([\w.-]+)", line)[1]), int(trips[1]) if trips else 1
            return [Matmul(x.name, x.flops * runs, x.unknown or not trips) for x in body]
        listed = re.search(r"branch_computations=\{([^}]*)\}", line)
        inner = _CALLED.findall(line) + (re.findall(r"%([\w.-]+)", listed[1]) if listed else [])
        return [one for name in inner for one in of(name)]

    return of(entry)


def _dot_flops(result: str, line: str, shapes: dict[str, str]) -> float:
    left = re.search(r" dot\(%?([\w.-]+),", line)[1]
    dims = [int(n) for n in re.search(r"\[([\d,]*)\]", shapes[left])[1].split(",")]
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1].split(",")
    size = 2.0
    for n in re.search(r"\[([\d,]*)\]", result)[1].split(","):
        size *= int(n or 1)
    for at in summed:
        size *= dims[int(at)]
    return size
