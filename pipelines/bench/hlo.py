"""What the TPU compiler expects of a program that it compiled: cycles, bytes on the wires, kernels.

The optimised HLO carries `estimated_cycles` on most instructions. A loop's body counts as often as the loop
runs; of a `conditional` the dearer branch counts. Collectives carry no estimate: bytes are taken from their
shapes. So they are of kernels that only move what they read, at half of the HBM's rate. A model, not a clock.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
# Bytes that leave a chip for one byte of the result (of reduce-scatter: of the operand), for many chips.
_SENT = {
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-reduce": 2.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_FUSED = re.compile(r" calls=%?([\w.-]+)")
_BESIDE = re.compile(r" call-start\(.* to_apply=%?([\w.-]+)")  # on sparse cores
_NAME = re.compile(r"%([\w.-]+) =")
_DONE = re.compile(r"call-done\(%?([\w.-]+)")
_SENT_A_CYCLE = 180e9 / 1.75e9  # bytes, over one axis; of v6e and v5p
_MOVED_A_CYCLE = 0.5 * 1640e9 / 1.75e9  # bytes, to and from HBM; of v6e
_MATMULS = re.compile(r"gmm|splash|flash|delta_net")  # names of kernels that compute more than they move
_OPERANDS = re.compile(r"custom-call\(([^)]*)\)")
_UNPRICED = ("fusion", "gather", "scatter", "sort")
_COMMENTS = re.compile(r"/\*.*?\*/|(?<=\])\{[^}]*\}")  # and layouts


@dataclass(frozen=True)
class Work:
    """Of one chip. `waited`: bytes sent while nothing else runs; `beside`: bytes sent beside other work, by
    channel; `kernels`: calls of Pallas kernels that multiply; `unpriced`: bytes that instructions without an
    estimate write, most of them rows that are gathered; `unknown`: loops whose length the program does not
    say.
    """

    cycles: float = 0.0
    waited: float = 0.0
    beside: tuple[tuple[str, float], ...] = ()
    kernels: float = 0.0
    unpriced: float = 0.0
    unknown: tuple[str, ...] = ()

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.cycles + other.cycles,
            self.waited + other.waited,
            # One collective is seen where it starts, goes on inside of other fusions, and ends.
            tuple((dict(self.beside) | dict(other.beside)).items()),
            self.kernels + other.kernels,
            self.unpriced + other.unpriced,
            self.unknown + other.unknown,
        )

    def times(self, n: int) -> "Work":
        beside = tuple((channel, n * sent) for channel, sent in self.beside)
        return Work(
            n * self.cycles, n * self.waited, beside, n * self.kernels, n * self.unpriced, self.unknown
        )


@dataclass
class _Program:
    computations: dict[str, list[str]]
    shapes: dict[str, str]  # of all instructions
    fused: set[str]  # computations that fusions and asynchronous instructions call
    trips: int = 1  # of a loop whose length the program does not say
    known: dict[str, Work] = field(default_factory=dict)

    def work(self, name: str) -> Work:
        """Of a computation; a fusion's own estimate covers what it calls, but for the collectives in it."""
        if name not in self.known:
            done, started = Work(), {}
            for shape, op, line in self._instructions(name):
                found = self._instruction(name, shape, op, line)
                if op == "call-start":
                    started[_NAME.search(line)[1]] = found, done
                elif op == "call-done":
                    found += _left(*started.get(_DONE.search(line)[1], (Work(), done)), done)
                done += found
            self.known[name] = done
        return self.known[name]

    def _instructions(self, name: str) -> Iterator[tuple[str, str, str]]:
        for line in self.computations.get(name, ()):
            found = _INSTRUCTION.match(_COMMENTS.sub("", line))
            if found:
                yield found[2], found[3], line

    def _instruction(self, name: str, shape: str, op: str, line: str) -> Work:
        if op == "while":
            return self._loop(line)
        if op == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            found = re.findall(r"%([\w.-]+)", listed[1] if listed else line.split("_computation=", 1)[1])
            return max((self.work(name) for name in found), key=lambda work: work.cycles, default=Work())
        if op == "call":
            return self.work(_CALLED.search(line)[1])
        if op.removesuffix("-start") in _SENT:
            sent = _SENT[op.removesuffix("-start")] * _bytes(shape, started=op.endswith("-start"))
            channel = re.search(r"channel_id=(\d+)", line)
            if op.endswith("-start") or name in self.fused:
                return Work(beside=((channel[1] if channel else line, sent),))
            return Work(waited=sent)
        if op == "custom-call" and "tpu_custom_call" in line:
            return self._kernel(shape, line)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        called = _CALLED.search(line) if op == "fusion" or op.endswith("-start") else None
        inside = self.work(called[1]) if called else Work()
        told = cycles or inside.beside or op not in _UNPRICED  # what a collective brings is told as sent
        return Work(
            float(cycles[1]) if cycles else 0.0,
            beside=inside.beside,
            kernels=inside.kernels,
            unpriced=inside.unpriced if told else float(_bytes(shape, started=False)),
            unknown=inside.unknown,
        )

    def _kernel(self, shape: str, line: str) -> Work:
        """Of a Pallas kernel; one that multiplies is priced by whoever knows how much."""
        if _MATMULS.search(_NAME.search(line)[1]):
            return Work(kernels=1)
        read = re.findall(r"%([\w.-]+)", _OPERANDS.search(line)[1])
        moved = sum(_bytes(self.shapes.get(name, ""), started=False) for name in read)
        return Work(cycles=(moved + _bytes(shape, started=False)) / _MOVED_A_CYCLE)

    def _loop(self, line: str) -> Work:
        body, condition = (re.search(rf"{part}=%?([\w.-]+)", line)[1] for part in ("body", "condition"))
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(self.computations.get(condition, ())))
        inside = self.work(body)
        if known or limits:
            return inside.times(int(known[1]) if known else max(map(int, limits)))
        return replace(inside.times(self.trips), unknown=(*inside.unknown, body))


def _left(sent: Work, before: Work, after: Work) -> Work:
    """What is waited for when something sent beside other work is needed; a kernel hides all of it."""
    if after.kernels > before.kernels:
        return Work()
    total = sum(size for _, size in sent.beside)
    return Work(waited=max(0.0, total - (after.cycles - before.cycles) * _SENT_A_CYCLE))


def _bytes(shape: str, started: bool) -> int:
    """Of a result; a `-start` returns its operands as well, which are the smaller part of an all-gather."""
    sizes = []
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        size = _SIZES.get(kind, 4)
        for n in dims.split(","):
            size *= int(n or 1)
        sizes.append(size)
    return max(sizes, default=0) if started else sum(sizes)


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    """(the lines of every computation, the name of the one that is run)."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def work(text: str, trips: int = 1) -> Work:
    """What one chip does in a program, given as the text of its optimised HLO; `trips`: how often loops run
    whose length it does not say."""
    computations, entry = computations_of(text)
    shapes = {
        found[1]: found[2]
        for lines in computations.values()
        for line in lines
        if (found := _INSTRUCTION.match(_COMMENTS.sub("", line)))
    }
    fused = {*_FUSED.findall(text), *_BESIDE.findall(text)}
    return _Program(computations, shapes, fused, trips).work(entry)
