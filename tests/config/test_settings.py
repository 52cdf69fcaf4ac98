"""What every configuration can do: nested records that are written flat, names that outlive new settings."""

import math
import re
from typing import Any, ClassVar

import pytest
from pydantic import Field

from icl.config import ConfigError, Settings
from icl.estimation import LLCConfig
from icl.sampling import SamplerConfig


class Inner(Settings):
    width: int = 3
    depth: int = Field(default=2, ge=1)


class Outer(Settings):
    flattened: ClassVar = ("inner",)
    later: ClassVar = ("colour",)

    inner: Inner = Inner()
    name: str = "a"
    colour: str = "red"


def test_the_keys_of_a_flattened_record_stand_beside_the_others():
    outer = Outer.parse({"width": 5, "name": "b"})
    assert outer.inner == Inner(width=5)
    assert outer.model_dump() == {"width": 5, "depth": 2, "name": "b", "colour": "red"}
    assert Outer.parse(outer.model_dump()) == outer


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"widht": 5}, "unknown key 'widht': did you mean 'width'?"),
        ({"depth": 0}, "depth: Input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_an_error_names_the_key_as_the_user_wrote_it(data, message):
    with pytest.raises(ConfigError) as caught:
        Outer.parse(data)
    assert str(caught.value) == message


def test_a_later_field_enters_a_name_only_where_it_has_another_value():
    assert "colour" not in Outer().decisive()
    assert Outer.parse({"colour": "blue"}).decisive("name", "colour") == {"name": "a", "colour": "blue"}


class Part(Settings):
    rate: float = 1.0
    flag: bool = False


class Whole(Settings):
    part: Part = Part()
    pair: tuple[float, float] = (0.0, 1.0)
    count: int | None = None
    constants: dict[str, float] = Field(default_factory=dict)
    name: str | None = None
    anything: dict[str, Any] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"count": True}, "count"),
        ({"part": {"rate": False}}, "part.rate"),
        ({"pair": [True, 0.5]}, "pair"),
        ({"constants": {"a": True}}, "constants"),
        ({"name": False}, "name"),
    ],
)
def test_true_and_false_are_no_numbers_and_no_texts(data, key):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: true and false are not allowed here"):
        Whole.parse(data)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf"])
@pytest.mark.parametrize("name", ["gamma", "nbeta", "temperature", "epsilon"])
def test_what_json_would_write_as_null_is_refused(name, value):
    """Otherwise its name and its identity would be those of the default."""
    with pytest.raises(ConfigError, match=rf"^{name}.*: must be a finite number; leave it out"):
        SamplerConfig.parse({name: value})


def test_settings_of_a_users_own_subject_are_finite_too():
    with pytest.raises(ConfigError, match=r"^subject_config: must be a finite number"):
        LLCConfig.parse({"subject": "my:Subject", "subject_config": {"a": [{"b": math.inf}]}})


def test_true_and_false_are_taken_where_they_belong():
    whole = Whole.parse({"part": {"flag": True}, "anything": {"a": [True]}})
    assert whole.part.flag
    assert whole.anything == {"a": [True]}


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ({"rate": 3}, "unknown key 'rate': it belongs in another place: part.rate"),
        ({"part": {"count": 3}}, "unknown key 'part.count': it belongs in another place: count"),
        ({"part.rate": 3}, "unknown key 'part.rate': write rate below part, as part: {parameters: {rate: ...}}"),
        ({"part": {"rates": 3}}, "unknown key 'part.rates': did you mean 'rate'?"),
        ({"part": {"zzz": 3}}, "unknown key 'part.zzz': known keys: flag, rate"),
    ],
)
def test_the_hint_for_an_unknown_key_says_where_it_belongs(data, hint):
    with pytest.raises(ConfigError, match=f"^{re.escape(hint)}"):
        Whole.parse(data)
