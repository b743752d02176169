"""The cells of a study: one method with one
setting and one seed on one configuration, one run.

A cell's folder is `STUDY/CONFIGURATION/METHOD[-SETTING]-seedN`,
beside its configuration, its log and a note on how it ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ilrec_dist.config.load import (
    apply_override,
    config_from_dict,
    drop_idle_keys,
    read_yaml,
    validated,
)
from ilrec_dist.config.tree import Config, ConfigError, check_together
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import with_hub_model
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.pipeline.run import Run
from ilrec_dist.study.config import StudyConfig

# The setting of a cell that leaves the configuration as it is.
DEFAULT = ""


@dataclass(frozen=True)
class Cell:
    configuration: str
    method: str
    setting: str
    seed: int
    config: Config

    @property
    def row(self) -> str:
        """The row of the table that it belongs
        to, with the cells of the other seeds.
        """
        return row_name(self.method, self.setting)

    @property
    def title(self) -> str:
        return f"{self.configuration}/{self.config.name}"

    @cached_property
    def run(self) -> Run:
        return open_run(self.config)

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def config_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def state_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def shared_stages(self) -> tuple[str, ...]:
        """The stages that do not depend on what is trained: data, codes, CF models."""
        return tuple(name for name, stage in self.run.stages.items() if stage.run is not None)

    @property
    def trainings(self) -> tuple[str, ...]:
        return tuple(name for name, stage in self.run.stages.items() if stage.training is not None)

    @property
    def evaluation(self) -> str:
        """The last stage, whose fingerprint covers
        all that the cell's figures depend on.
        """
        return list(self.run.stages)[-1]

    def fingerprint(self) -> str:
        return self.run.fingerprint(self.evaluation)


def row_name(method: str, setting: str) -> str:
    return f"{method} {setting}".rstrip()


def make_cells(study: StudyConfig, source: str | Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """All cells in the order in which they run:
    the methods, then the settings, seed by seed.

    `source` is the study's file, overrides are settings
    of every cell. Raises ConfigError that names the cell.
    """
    cells = []
    for name, base in study.configurations.items():
        path = Path(source).parent / base.config
        tree = read_yaml(path)
        _set(tree, base.set)
        for override in overrides:
            apply_override(tree, override)
        methods, seeds = base.methods or study.methods, base.seeds or study.seeds
        _check_base(methods, name, tree, f"{source}: configuration {name} ({path})")
        for method, setting, seed, values in _grid(study, name, methods, seeds):
            where = f"{source}: cell {name}/{row_name(method, setting)}"
            config = _cell_config(study, name, tree, method, setting, seed, values, where)
            cells.append(Cell(name, method, setting, seed, config))
    _check_names(cells, source)
    _check_data(cells, source)
    return cells


def _grid(
    study: StudyConfig, configuration: str, methods: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, str, int, Mapping[str, Any]]]:
    """(method, setting, seed, values) of each cell: first the methods, seed by seed."""
    for seed in seeds:
        for method in methods:
            yield method, DEFAULT, seed, {}
    settings = {
        name: setting
        for name, setting in study.settings.items()
        if configuration in (setting.configurations or study.configurations)
    }
    for seed in dict.fromkeys(
        seed for setting in settings.values() for seed in setting.seeds or seeds
    ):
        for name, setting in settings.items():
            for method in setting.methods or methods:
                if method in methods and seed in (setting.seeds or seeds):
                    yield method, name, seed, setting.set


def _check_base(methods: Sequence[str], name: str, tree: dict[str, Any], source: str) -> None:
    """Refuse a key that none of the configuration's
    methods reads, as a run of them all does.
    """
    trained = dict.fromkeys(name for method in methods for name in _with_starts(method))
    with_methods = _copy(tree)
    _set(with_methods, {"train.methods": list(trained), "name": name})
    config_from_dict(with_methods, source)


def _cell_config(
    study: StudyConfig,
    configuration: str,
    base: dict[str, Any],
    method: str,
    setting: str,
    seed: int,
    values: Mapping[str, Any],
    source: str,
) -> Config:
    tree = _copy(base)
    _set(tree, values)
    parts = [method, setting, f"seed{seed}"]
    overrides = {
        "name": "-".join(part for part in parts if part),
        "runs_dir": str(study.folder / configuration),
        "train.methods": _with_starts(method),
        "train.seeds": [seed],
    }
    for key in values:
        if key in overrides:
            raise ConfigError(f"{source}: key {key!r} is the study's; leave it out of the setting")
    _set(tree, overrides)
    # Keys of the configuration that other methods read have no effect on this one.
    config, dropped = drop_idle_keys(validated(Config, tree, source))
    for key in values:
        if key in dropped:
            raise ConfigError(
                f"{source}: key {key!r} has no effect on {method} here; name the methods that read "
                f"it in settings.{setting}.methods, or leave it out"
            )
    check_together(config, source)
    return with_hub_model(config)


def _with_starts(method: str) -> list[str]:
    """The method after those whose weights it begins with."""
    chain = [method]
    while (start := get_method(chain[0]).starts_from) is not None:
        chain.insert(0, start)
    return chain


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    return copied


def _set(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        # JSON is YAML.
        apply_override(tree, f"{key}={json.dumps(value, default=str)}")


def _check_names(cells: Sequence[Cell], source: str | Path) -> None:
    """Two cells of one folder, as method `a`
    with setting `b-c` and method `a-b` with `c`.
    """
    names = [cell.title for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{source}: two cells have the folder {name}; rename a setting")


def _check_data(cells: Sequence[Cell], source: str | Path) -> None:
    """Rows are compared by user, so that a setting may not change the data."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.configuration, cell)
        if cell.run.stages["prepare"].settings != other.run.stages["prepare"].settings:
            raise ConfigError(
                f"{source}: settings.{cell.setting} changes the data, so that its rows cannot be "
                "compared with the others by user; make it a configuration of its own"
            )
