"""The study file: what is compared with what, over which data sets, settings and seeds.

docs/studies.md explains the keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Optional

from annotated_types import MinLen
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from ilrec_dist.common.config_fields import NonNegative, distinct, section
from ilrec_dist.config.load import apply_override, read_yaml, validated
from ilrec_dist.config.tree import ConfigError
from ilrec_dist.training.config import MethodName

PAGE = "docs/studies.md"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*")


def _folder_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise PydanticCustomError(
            "folder_name", "input should be a name of letters, digits, points, _ and -"
        )
    return name


Name = Annotated[str, AfterValidator(_folder_name)]
Seeds = Annotated[list[NonNegative], MinLen(1), AfterValidator(distinct)]
Methods = Annotated[list[MethodName], MinLen(1), AfterValidator(distinct)]
Settings = dict[str, Any]


@section()
class BaseConfig:
    """A configuration that cells are made of: a
    file, with settings that replace the file's.
    """

    # The file, relative to the study's.
    config: str
    set: Settings = field(default_factory=dict)
    # The methods and seeds of its cells, instead of the study's.
    methods: Optional[Methods] = None
    seeds: Optional[Seeds] = None


@section()
class SettingConfig:
    """A setting that is tried: keys with the
    values that replace the configuration's.
    """

    set: Annotated[Settings, MinLen(1)]
    # The methods, seeds and configurations that it is tried with; None: all.
    methods: Optional[Methods] = None
    seeds: Optional[Seeds] = None
    configurations: Optional[list[Name]] = None


@section()
class StudyConfig:
    """The root of a study file."""

    # The study's folder is runs_dir/name.
    name: Name
    configurations: Annotated[dict[Name, BaseConfig], MinLen(1)]
    methods: Methods
    runs_dir: str = "runs"
    seeds: Seeds = field(default_factory=lambda: [0])
    settings: dict[Name, SettingConfig] = field(default_factory=dict)
    # Rows that every other row is compared with; empty: the first of the methods.
    against: Annotated[list[str], AfterValidator(distinct)] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> tuple[StudyConfig, list[str]]:
    """Read a study file.

    Overrides of keys without a point replace the study's own; the
    others are settings of every cell, and are returned. Raises
    ConfigError with one line that names the file and the key.
    """
    tree = read_yaml(path)
    of_cells = [override for override in overrides if "." in override.partition("=")[0]]
    of_study = [override for override in overrides if override not in of_cells]
    for override in of_study:
        apply_override(tree, override)
    source = " ".join([str(path), *of_study])
    study = validated(StudyConfig, tree, source, PAGE)
    for name, setting in study.settings.items():
        for configuration in setting.configurations or ():
            if configuration not in study.configurations:
                raise ConfigError(
                    f"{source}: key 'settings.{name}.configurations': unknown configuration "
                    f"{configuration!r}; expected some of {', '.join(study.configurations)}"
                )
        for method in setting.methods or ():
            if method not in study.methods:
                raise ConfigError(
                    f"{source}: key 'settings.{name}.methods': {method!r} is not among the study's "
                    f"methods {study.methods}; add it there, or leave it out here"
                )
    return study, of_cells
