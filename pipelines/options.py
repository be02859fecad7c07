"""Command-line options made from the fields of a stage's configuration."""

import typing
from collections.abc import Callable
from typing import Any

import click

from common.config import Knob, knobs


class Numbers(click.ParamType):
    """Numbers separated by commas, as a tuple."""

    def __init__(self, kind: type) -> None:
        self.name = {int: "integers", float: "floats"}[kind]
        self._kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        try:
            return tuple(self._kind(number) for number in value.split(","))
        except ValueError:
            self.fail(f"{value!r} are not {self.name} with commas between them", param, ctx)


def options(config: type, default: str = "default: {}") -> Callable:
    """A decorator that adds an option for every field of `config` that has a setting.

    An option that is not given is None: the configuration's default, which the help tells in the words of
    `default`, holds then, or whatever else comes before it.
    """

    def add(command: Callable) -> Callable:
        for knob in reversed(knobs(config)):
            command = _option(knob, default)(command)
        return command

    return add


def _option(knob: Knob, default: str) -> Callable:
    flag, value = "--" + knob.name.replace("_", "-"), knob.default
    if knob.kind is bool:
        both, word = f"{flag}/--no-{flag[2:]}", "yes" if value else "no"  # a recipe may have set either
        text = f"{knob.setting.help} ({default.format(word)})"
        return click.option(both, default=None, is_flag=True, help=text)
    if isinstance(value, tuple):
        value = ",".join(str(number) for number in value)
    several = {"multiple": True, "callback": _given} if knob.kind == tuple[str, ...] else {}
    text = knob.setting.otherwise if value is None else f"{value:g}" if knob.kind is float else value
    return click.option(
        flag, type=_kind(knob), default=None, help=f"{knob.setting.help} ({default.format(text)})", **several
    )


def _given(_ctx: Any, _param: Any, values: tuple[str, ...]) -> tuple[str, ...] | None:
    return values or None


def _kind(knob: Knob) -> click.ParamType:
    """What click parses the option's text as."""
    s = knob.setting
    if s.choices:
        return click.Choice(s.choices)
    if knob.kind == tuple[str, ...]:
        return click.STRING
    if typing.get_origin(knob.kind) is tuple:
        return Numbers(typing.get_args(knob.kind)[0])
    lowest = s.above if s.least is None else s.least
    if knob.kind is int:
        return click.IntRange(None if lowest is None else int(lowest), s.most)
    if knob.kind is float:
        highest = s.below if s.most is None else s.most
        return click.FloatRange(lowest, highest, min_open=s.above is not None, max_open=s.below is not None)
    return click.STRING
