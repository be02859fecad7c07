"""A chat template is text that others wrote: it is rendered in jinja2's sandbox, within bounds.

The environment is the one that chat templates are written for (transformers documents it): blocks are
trimmed, loops may break, `tojson` keeps characters, `raise_exception` refuses a conversation, and the parts
between `{% generation %}` and `{% endgeneration %}` are the answers. A render ends after 10 s of computing
or 64 MiB of text, where Linux counts memory after 2 GiB more of it, and no integer grows past 4,096 bits;
so a template that loops, recurses or grows for ever refuses a conversation and no more.
"""

import gc
import json
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import EyasError
from common.texts import first_line

# Templates that print today's date would give other bytes tomorrow: they get the date that the published
# Llama 3 templates fall back to.
_DATE = {
    "%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%A": "Friday", "%a": "Fri",
    "%H": "00", "%M": "00", "%S": "00", "%-d": "26", "%-m": "7",
}  # fmt: skip
_SECONDS = 10.0  # of this process's computing, so that a busy machine refuses nothing
_CHARACTERS = 64 << 20
_MEMORY = 2 << 30
_BITS = 4096
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode sets these aside for a program's own use: no text has them
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")

Marked = tuple[str, list[tuple[int, int]]]  # text, and the answers that the template marks in it


class TemplateRefusedError(ValueError):
    """The template raised for this conversation (no system role, say); str() is the template's message."""


class TemplateRanAwayError(TemplateRefusedError):
    """The template left its bounds, as it may do for every conversation."""


class _OutOfTimeError(Exception):
    """Nothing in a template catches it."""


class Template:
    """A compiled chat template; `marks_answers` is true if it says itself what the model writes."""

    def __init__(self, text: str, where: str = "the model"):
        """EyasError, which names `where` it is from, if `text` is not a template."""
        self.marks_answers = re.search(r"{%-?\s*generation\s*-?%}", text) is not None
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _fixed_date}
        try:
            with _bounded():
                self._template = environment.from_string(text)
        except (jinja2.TemplateError, *_FAULTS) as error:
            raise EyasError(
                f"the chat template of {where} is no Jinja template: {first_line(error)}"
            ) from None

    def render(self, **variables: Any) -> Marked:
        """The text for some variables. TemplateRefusedError if the template raises or leaves its bounds."""
        try:
            with _bounded():
                text = "".join(_counted(self._template.generate(**variables)))
        except _OutOfTimeError:
            raise TemplateRanAwayError(f"it was not done after {_SECONDS:.0f} s") from None
        except RecursionError:
            raise TemplateRanAwayError("it calls itself for ever") from None
        except MemoryError:
            raise TemplateRanAwayError("it needs too much memory") from None
        except TemplateRanAwayError:
            raise
        except (jinja2.TemplateError, *_FAULTS) as error:
            # Only what the template itself raises is its own text; other errors can quote the conversation.
            own = type(error) is jinja2.TemplateError
            reason = first_line(error) if own else f"{type(error).__name__} inside the template"
            raise TemplateRefusedError(reason) from None
        return _without_marks(text) if self.marks_answers else (text, [])


# What expressions of a template raise; anything else is a fault of ours.
_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class _Environment(ImmutableSandboxedEnvironment):
    """Python multiplies and raises integers of any size without looking at signals: here they stay small."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS:
                raise TemplateRanAwayError("it makes an integer that is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` encloses what the model writes."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _fixed_date(form: str) -> str:
    for code, text in _DATE.items():
        form = form.replace(code, text)
    return form


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **given: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **given)


def _counted(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > _CHARACTERS:
            raise TemplateRanAwayError(f"it renders more than {_CHARACTERS >> 20} MiB of text")
        yield piece


def _without_marks(text: str) -> Marked:
    pieces = _MARKS.split(text)
    spans, at = [], 0
    for number, piece in enumerate(pieces):
        if number % 2:
            spans.append((at, at + len(piece)))
        at += len(piece)
    return "".join(pieces), spans


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends what runs inside by _OutOfTimeError or MemoryError; the time only in the main thread."""
    timed = threading.current_thread() is threading.main_thread()
    # CPU time, not the clock's: the process's other timers and a busy machine are left out.
    before = signal.signal(signal.SIGVTALRM, _stop) if timed else None
    limit = _limit_memory()
    collects = gc.isenabled()
    gc.disable()  # Python forgets what a handler raises inside of a collector's callback
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        if collects:
            gc.enable()
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, limit)


def _stop(*_: object) -> None:
    raise _OutOfTimeError


def _limit_memory() -> tuple[int, int] | None:
    """Lowers the limit of the process's address space; returns the one before, None if it is left alone."""
    if sys.platform != "linux":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        wanted = int(file.read().split()[0]) * resource.getpagesize() + _MEMORY
    if soft != resource.RLIM_INFINITY and soft < wanted:
        return None
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    return soft, hard
