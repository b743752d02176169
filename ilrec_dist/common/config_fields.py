"""The types of configuration fields, and the
decorator that makes a section of the tree.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Interval
from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Int = Annotated[int, Strict()]
Float = Annotated[float, Strict(), BeforeValidator(_number)]
Bool = Annotated[bool, Strict()]
Positive = Annotated[Int, Ge(1)]
NonNegative = Annotated[Int, Ge(0)]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
Fraction = Annotated[Float, Interval(ge=0, lt=1)]
# YAML makes dates of 2018-10-01.
Text = Annotated[str, BeforeValidator(str)]
T = TypeVar("T")


def distinct(values: list[Any]) -> list[Any]:
    """For AfterValidator: refuse a list in which a value occurs twice."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "input should be distinct values")
    return values


class Affects:
    """Metadata of a field: the stages of a run whose outcome depends on it.

    A change of the field runs those stages again. `Affects()` marks a field
    that changes where, how fast or how visibly the work is done, but no result.
    """

    def __init__(self, *stages: str) -> None:
        self.stages = stages


class OnlyIf:
    """Metadata of a field: it has an effect only
    where `holds(config)`, of the whole tree.

    `condition` is what the user would have to set, such as "data.split
    chronological", or a function that says it. A field without an effect
    that differs from its default is refused when a configuration is loaded.
    """

    def __init__(self, condition: str | Callable[[], str], holds: Callable[[Any], bool]) -> None:
        self._condition, self.holds = condition, holds

    @property
    def condition(self) -> str:
        return self._condition if isinstance(self._condition, str) else self._condition()


def key_of(name: str) -> str:
    """A field's key in YAML, on the command line, in errors and documents.

    It is the field's name without a trailing underscore, which a
    name has where the key is a word of Python, such as `from_`.
    """
    return name.removesuffix("_")


@typing.dataclass_transform(frozen_default=True)
def section(affects: str | None = None) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass of the tree that refuses unknown keys.

    `affects` is the stage whose outcome depends on those fields that say
    nothing themselves; without it every field says which stages it affects.
    """

    def decorate(cls: type[T]) -> type[T]:
        cls = dataclass(frozen=True)(cls)
        cls.__pydantic_config__ = ConfigDict(  # type: ignore[attr-defined]
            extra="forbid", allow_inf_nan=False, alias_generator=key_of
        )
        cls.__affects__ = None if affects is None else (affects,)  # type: ignore[attr-defined]
        return cls

    return decorate


def stage_settings(config: Any, stage: str) -> dict[str, Any]:
    """The values of all fields, below a tree or
    one of its sections, that affect `stage`.
    """
    settings: dict[str, Any] = {}
    cls: Any = type(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = stage_settings(value, stage)
            if inner:
                settings[key_of(field.name)] = inner
            continue
        stages = _affected_stages(cls)[field.name]
        if stages is None:
            raise TypeError(f"{cls.__name__}.{field.name} does not say which stages it affects")
        if stage in stages:
            settings[key_of(field.name)] = value
    return settings


def fields_without_effect(config: Any) -> Iterator[tuple[str, str]]:
    """(key, condition) of every field that differs from its default but has no effect.

    `config` is the whole tree. Sections in which a
    condition of their own field fails count too.
    """
    yield from _without_effect(config, config, "")


def _without_effect(config: Any, tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    cls: Any = type(tree)
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        failing = None
        if value != _default(field):
            marks = _conditions(cls)[field.name]
            failing = next((mark for mark in marks if not mark.holds(config)), None)
        if failing is not None:
            yield prefix + key_of(field.name), failing.condition
        elif dataclasses.is_dataclass(value):
            yield from _without_effect(config, value, f"{prefix}{key_of(field.name)}.")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@cache
def _affected_stages(cls: Hashable) -> dict[str, tuple[str, ...] | None]:
    default: tuple[str, ...] | None = getattr(cls, "__affects__", None)
    return {
        name: next((mark.stages for mark in marks if isinstance(mark, Affects)), default)
        for name, marks in _metadata(cls).items()
    }


@cache
def _conditions(cls: Hashable) -> dict[str, list[OnlyIf]]:
    return {
        name: [mark for mark in marks if isinstance(mark, OnlyIf)]
        for name, marks in _metadata(cls).items()
    }


def _metadata(cls: Any) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: getattr(hints[field.name], "__metadata__", ())
        for field in dataclasses.fields(cls)
    }


def config_to_dict(config: Any) -> dict[str, Any]:
    """The tree, or one section of it, as plain
    dicts and lists, ready for YAML or JSON.
    """
    return dataclasses.asdict(
        config, dict_factory=lambda items: {key_of(name): value for name, value in items}
    )


def section_from_dict(cls: type[T], tree: dict[str, Any]) -> T:
    """The inverse of config_to_dict; raises pydantic's ValidationError."""
    hashable: Any = cls
    validated: T = _adapter(hashable).validate_python(tree)
    return validated


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """What checks a section; to build it for
    the whole tree takes a fifth of a second.
    """
    return TypeAdapter(cls)
