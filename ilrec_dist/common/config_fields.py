"""The types of configuration fields, and the decorator that makes a section of the configuration tree."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Interval
from pydantic import BeforeValidator, ConfigDict, Strict


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
Text = Annotated[str, BeforeValidator(str)]  # YAML makes dates of 2018-10-01
T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass of the tree that refuses unknown keys."""
    cls = dataclass(frozen=True)(cls)
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return cls


def config_to_dict(config: Any) -> dict[str, Any]:
    """The tree, or one section of it, as plain dicts and lists, ready for YAML or JSON."""
    return dataclasses.asdict(config)
