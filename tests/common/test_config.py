"""A configuration's fields refuse what they do not state, and name field, value and what it must be."""

from dataclasses import dataclass

import pytest

from common.config import Setting, check, differences, digest, setting


@dataclass(frozen=True)
class Config:
    folder: str
    count: int = setting(4, "A count.", least=1)
    share: float = setting(0.5, "A share.", least=0, below=1)
    rate: float = setting(1.0, "A rate.", above=0)
    kind: str = setting("a", "A kind.", choices=("a", "b"))
    limit: int | None = setting(None, "A limit.", least=2, otherwise="all")
    layers: tuple[int, ...] | None = setting(None, "Layers.", least=0)
    pair: tuple[float, float] = setting((0.1, 0.2), "A pair.", below=1)
    whole: bool = setting(False, "All of it.")

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("folder", "", "a folder or URL, and not empty"),
        ("folder", None, "a folder or URL, and not empty"),
        ("count", 0, "a whole number of at least 1"),
        ("count", 2**31, "a whole number of at least 1 and of at most 2147483647"),
        ("count", 2**64, "a whole number of at least 1 and of at most 2147483647"),
        ("count", "4", "a whole number of at least 1"),
        ("count", 4.0, "a whole number of at least 1"),
        ("count", True, "a whole number of at least 1"),
        ("count", None, "a whole number of at least 1"),
        ("share", 1, "a number of at least 0 and below 1"),
        ("share", float("nan"), "a number of at least 0 and below 1"),
        ("share", [0.1], "a number of at least 0 and below 1"),
        ("rate", 0.0, "a number above 0"),
        ("rate", float("inf"), "a number above 0"),
        ("rate", 10**400, "a number above 0"),
        ("rate", 1e39, "a number above 0, in float32 as well"),
        ("rate", 1e-300, "a number above 0, in float32 as well"),
        ("rate", 1e-39, "a number above 0, in float32 as well"),
        ("share", 1e-39, "a number of at least 0 and below 1, in float32 as well"),
        ("pair", (0.9, 0.999999999), "a number below 1, in float32 as well"),
        ("limit", 1, "a whole number of at least 2"),
        ("layers", 3, "some numbers"),
        ("layers", (), "some numbers"),
        ("layers", ("3",), "a whole number of at least 0"),
        ("pair", (0.1,), "2 numbers"),
        ("pair", (0.1, 1.0), "a number below 1"),
        ("whole", "yes", "true or false"),
        ("whole", 1, "true or false"),
    ],
)
def test_a_value_of_another_kind_or_outside_of_the_bounds_is_refused(field, value, must):
    with pytest.raises(ValueError, match=rf"^{field}=.* must be {must}$"):
        Config(**{"folder": "f", field: value})


@pytest.mark.parametrize("value", ["c", ["a"], 5, None])
def test_a_choice_is_one_of_those_listed(value):
    with pytest.raises(ValueError, match=r"^kind=.* is unknown; use one of a, b$"):
        Config("f", kind=value)


def test_a_bound_itself_holds_its_bounds():
    """In float32 too, where 0.7 is less, and 0.1 more."""
    assert Setting("", most=0.1, least=0.1).problem(0.1, float) == ""
    assert Setting("", most=0.7, least=0.7).problem(0.7, float) == ""


def test_lists_and_whole_numbers_of_toml_become_the_fields_types():
    made = Config("f", rate=2, layers=[1, 2], pair=[0, 0.5], limit=None)
    assert (made.rate, made.layers, made.pair) == (2.0, (1, 2), (0.0, 0.5))
    assert {type(n) for n in (made.rate, *made.pair)} == {float}
    assert digest(made) == digest(Config("f", rate=2.0, layers=(1, 2), pair=(0.0, 0.5)))


def test_differences_name_every_field():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}
    assert differences(old, new) == ["a.c: 2 there, 3 here"]
