"""The base class of all configurations: frozen, typed records. Their errors are one readable line."""

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

_DECISIVE = "decisive"

_NOT_FINITE = "must be a finite number; leave it out, and its default is taken"
_MEANT = {"finite_number": _NOT_FINITE}
"""Kind of error in pydantic -> a plainer message."""


class ConfigError(ValueError):
    """The user's configuration is wrong; the message is one line that names the key, the value and the remedy."""


class Settings(BaseModel):
    """Base of all configurations: frozen, hashable by value; unknown keys and numbers that are not finite are refused.

    JSON has no infinity: a run with `.inf` would be stored, and named, like one with null.

    A field named in `flattened` holds another configuration. In files and dumps, that configuration's keys are written beside the
    other keys. So files are flat although the record is nested.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    flattened: ClassVar[tuple[str, ...]] = ()
    later: ClassVar[tuple[str, ...]] = ()
    """Fields that were added later. `decisive` leaves them out while they have their default, so that names of old runs stay."""
    decides: ClassVar[tuple[str, ...]] = ()
    """Fields that decide what a run computes. Its name is made of them, and `difference` compares them."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not cls.flattened or not isinstance(data, Mapping):
            return data
        rest = dict(data)
        for name in cls.flattened:
            own = {key: rest.pop(key) for key in cls._record(name).model_fields if key in rest}
            held = rest.setdefault(name, own)
            if own and held is not own:  # the record and some of its keys, as in a copy with other values
                rest[name] = held.model_copy(update=own) if isinstance(held, Settings) else {**held, **own}
        return rest

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if not _takes_booleans(cls, str(info.field_name)) and any(isinstance(each, bool) for each in _leaves(value)):
            raise ValueError(
                "true and false are not allowed here; YAML also reads yes, no, on and off as them, unless they are in quotes"
            )
        return value

    @model_serializer(mode="wrap")
    def _spread(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        data = handler(self)
        if info.context == _DECISIVE:
            defaults = {name: type(self).model_fields[name].get_default() for name in self.later}
            data = {
                name: value
                for name, value in data.items()
                if name not in defaults or getattr(self, name) != defaults[name]
            }
        for name in self.flattened:
            part = data.pop(name, {})
            data = {**part, **data} if self.writes(name) else data
        return data

    def writes(self, flattened: str) -> bool:
        """Whether the keys of a flattened record are part of dumps. A subclass may leave out a record that has no meaning in it."""
        return True

    @classmethod
    def user_fields(cls) -> dict[str, FieldInfo]:
        """The fields as they are written in files: a flattened record is replaced by its own fields."""
        found: dict[str, FieldInfo] = {}
        for name, field in cls.model_fields.items():
            found |= cls._record(name).model_fields if name in cls.flattened else {name: field}
        return found

    @classmethod
    def _record(cls, name: str) -> type[BaseModel]:
        """The class of configuration that a flattened field holds."""
        kind = cls.model_fields[name].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        return kind

    def decisive(self, *fields: str) -> dict[str, Any]:
        """Plain data of the given fields (all, if none is given), without `later` fields at their default.

        Names are made from it, so a new setting does not change the names of old runs.
        """
        return self.model_dump(mode="json", include=set(fields) or None, context=_DECISIVE)

    def identity(self) -> dict[str, Any]:
        """Plain data of the fields that decide what a run computes."""
        return self.model_dump(mode="json", include=set(self.decides))

    def difference(self, stored: Mapping[str, Any]) -> str:
        """How a stored run differs from a run of these settings: "key=1, not 2", or an empty text.

        Only settings that decide what a run computes are compared. A setting that is not stored counts as its default.

        Args:
            stored: a configuration as it was written with a run.

        Raises:
            ConfigError: this version does not accept the stored settings.
        """
        own = self.identity()
        kept = {key: value for key, value in stored.items() if key in own}
        then, now = dotted(type(self).parse(kept).identity()), dotted(own)
        differing = [key for key in {**now, **then} if then.get(key) != now.get(key)]
        if not differing:
            return ""
        first, more = differing[0], f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        return f"{first}={_short(then.get(first))}, not {_short(now.get(first))}{more}"

    def refuse_another(self, stored: Mapping[str, Any], what: str) -> None:
        """Refuse results that were made with other settings than these. `what` is their name in the message.

        Raises:
            ConfigError: a setting differs. The message names the first one, both values, and what to do.
        """
        try:
            difference = self.difference(stored)
        except ConfigError as error:
            difference = f"settings that this version of icl does not accept ({error})"
        if difference:
            raise ConfigError(
                f"{what} was made with {difference}; use the settings it was made with, give this run another run_name, "
                "or delete the stored one"
            )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, in which some fields have other values. They are checked like those of a new record.

        Raises:
            ConfigError: a name is unknown, or a value is not accepted.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        return self.parse({name: getattr(copied, name) for name in self.model_fields_set} | dict(update))

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Validate plain data.

        Raises:
            ConfigError: the data are not valid. The message is one line with the dotted key, the value and what is
                expected, or for an unknown key the nearest known one.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(_one_line(cls, error)) from None


def dotted(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as one mapping of dotted keys. A value that is itself a mapping is flattened too."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def finite(value: Any) -> Any:
    """A value of a field that accepts anything, after checking that no number in it is infinite or nan.

    Raises:
        ValueError: a number is.
    """
    if any(isinstance(each, float) and not math.isfinite(each) for each in _leaves(value)):
        raise ValueError(_NOT_FINITE)
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(settings: type[Settings], error: ValidationError) -> str:
    """The first problem of a validation error, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = first["loc"][1:] if first["loc"][:1] and first["loc"][0] in settings.flattened else first["loc"]
    key = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        text = f"unknown key {key!r}: {_hint(settings, place)}"
    else:
        message = _MEANT.get(first["type"], first["msg"].removeprefix("Value error, "))
        given = first.get("input")
        shown = f" (got {_shown(given)})" if isinstance(given, (str, int, float, bool, list, tuple, type(None))) else ""
        text = f"{key}: {message}{shown}" if key else message
    more = len(problems) - 1
    return text + (f" [and {more} more problem{'s' if more > 1 else ''}]" if more else "")


@cache
def _takes_booleans(settings: type[BaseModel], name: str) -> bool:
    """Whether a field's type may accept true and false: it includes bool, accepts anything, or is a record."""

    def kinds(annotation: Any) -> Iterator[Any]:
        yield annotation
        for inner in get_args(annotation):
            yield from kinds(inner)

    own = (bool, Any, object)
    return any(
        kind in own or isinstance(kind, bool) or (isinstance(kind, type) and issubclass(kind, BaseModel))
        for kind in kinds(settings.model_fields[name].annotation)
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (str, int, float)):  # most values are; the test for an abstract class below is slow
        yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _hint(settings: type[Settings], place: tuple[int | str, ...]) -> str:
    """Where an unknown key belongs, or which known one it may stand for."""
    name = str(place[-1])
    outer, dot, inner = name.partition(".")
    if dot:  # the form of Hydra and of --set
        return f"write {inner} below {outer}, as {outer}: {{parameters: {{{inner}: ...}}}} in a sweep file"
    known = _known_keys(settings, place[:-1])
    near = get_close_matches(name, known, n=1, cutoff=0.8)
    elsewhere = [key for key in _all_keys(settings) if key.rpartition(".")[2] == name]
    if elsewhere and not near:
        return f"it belongs in another place: {' or '.join(elsewhere)}"
    near = near or get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"


def _all_keys(settings: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all settings, including those of nested records."""
    for name, field in _user_fields(settings).items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _all_keys(kind, f"{prefix}{name}.")


def _known_keys(settings: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the record at `path` below `settings`; empty if there is no record at `path`."""
    for part in path:
        field = _user_fields(settings).get(str(part))
        candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        settings = inner[0]
    return list(_user_fields(settings))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _user_fields(settings: type[BaseModel]) -> dict[str, FieldInfo]:
    return settings.user_fields() if issubclass(settings, Settings) else dict(settings.model_fields)
