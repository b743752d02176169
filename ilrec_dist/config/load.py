"""Loads the configuration from YAML with dotted overrides.

`ilrec config CONFIG` prints the result.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ilrec_dist.common.config_fields import config_to_dict, key_of, section_from_dict
from ilrec_dist.config.tree import Config, ConfigError, check_together, idle_keys

T = TypeVar("T")


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value`
    overrides (values are YAML), check everything.

    Raises ConfigError with one line that names the file and the key.
    """
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return config_from_dict(tree, " ".join([str(path), *overrides]))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises
    ConfigError that names the file and the place.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such configuration file; the ones that ship are in configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}: malformed YAML{where}: {getattr(error, 'problem', error)}"
        ) from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of sections at the top, found {type(tree).__name__}"
        )
    return tree


def config_from_dict(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a plain dict against the tree; `source` is named in errors."""
    config = validated(Config, tree, source)
    check_together(config, source)
    return config


def validated(
    cls: type[T], tree: dict[str, Any], source: str, page: str = "docs/configuration.md"
) -> T:
    """A tree of sections from plain values; `page` lists its keys.

    Raises ConfigError that names `source` and the key.
    """
    try:
        return section_from_dict(cls, tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_one_line(error, tree, cls, page)}") from None


def drop_idle_keys(config: Config) -> tuple[Config, list[str]]:
    """The configuration with every key that
    nothing reads at its default, and those keys.
    """
    dropped: list[str] = []
    while key := next(idle_keys(config), None):
        tree = config_to_dict(config)
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node[name]
        del node[leaf]
        config = validated(Config, tree, key)
        dropped.append(key)
    return config, dropped


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that
    load_config reads back to an equal tree.
    """
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one
    mapping; YAML itself lets the last one win.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in a plain tree.
    Raises ConfigError that names the override.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected key.sub=value, such as train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section"
            )
        node = child
    node[leaf] = value


def _one_line(error: ValidationError, tree: dict[str, Any], cls: type, page: str) -> str:
    first, all_keys = error.errors()[0], _all_keys(cls)
    all_names = {part for key in all_keys for part in key.split(".")}
    parts = [
        str(part)
        for part in first["loc"]
        if isinstance(part, int) or str(part) in all_names or _in_tree(tree, first["loc"])
    ]
    key = ".".join(parts) or "top level"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        nearest = difflib.get_close_matches(key, all_keys, n=1, cutoff=0.0)
        return f"unknown key {key!r}; the nearest key is {nearest[0]!r} ({page} lists all)"
    expected = first["msg"][0].lower() + first["msg"][1:]
    return f"key {key!r}: {expected}, found {first['input']!r}"


def _in_tree(tree: Any, loc: tuple[Any, ...]) -> bool:
    for part in loc:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    hints: dict[str, Any] = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        key = prefix + key_of(item.name)
        keys.append(key)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += _all_keys(hints[item.name], f"{key}.")
    return keys
