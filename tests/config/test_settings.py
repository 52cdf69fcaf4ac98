"""What every configuration can do: nested records that are written flat, names that outlive new settings."""

from typing import ClassVar

import pytest
from pydantic import Field

from icl.config import ConfigError, Settings


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
