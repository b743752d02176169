"""docs/configuration.md lists the keys of the configuration tree with their
defaults.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.tree import Config

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROW = re.compile(r"^\| `([a-z_.0-9]+)` \| `([^`]*)` \| .+ \| .+ \|$", re.MULTILINE)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_key_is_documented_with_its_default():
    documented = {
        key: yaml.safe_load(default)
        for key, default in ROW.findall((DOCS / "configuration.md").read_text(encoding="utf-8"))
    }
    actual = dict(leaves(config_to_dict(Config())))
    assert sorted(actual.keys() - documented.keys()) == []
    assert sorted(documented.keys() - actual.keys()) == []
    assert {
        key: (value, actual[key]) for key, value in documented.items() if value != actual[key]
    } == {}


def test_sections_have_a_heading():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default_factory):
            assert f"## `{field.name}`" in text


def test_links_between_the_documents_lead_somewhere():
    for page in [
        *DOCS.glob("*.md"),
        DOCS.parent / "README.md",
        DOCS.parent / "benchmarks/results/README.md",
    ]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
