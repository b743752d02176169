"""A study of the tiny run of tests/training/conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ilrec_dist.common.config_fields import config_to_dict
from tests.support.tiny_run import tiny_config


def write_study(
    folder: Path,
    *,
    base: dict[str, Any] | None = None,
    methods: tuple[str, ...] | list[str] = ("sft", "ilrec"),
    **keys: Any,
) -> Path:
    """Write base.yaml and study.yaml into the
    folder; the study's runs go to folder/runs.

    base: sections that change the tiny configuration. keys: further keys of the study.
    """
    tree = config_to_dict(tiny_config(folder / "runs"))
    for section, values in (base or {}).items():
        tree[section] = {**tree[section], **values}
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    study = {
        "name": "tiny-study",
        "runs_dir": str(folder / "runs"),
        "configurations": {"shop": {"config": "base.yaml"}},
        "methods": list(methods),
        **keys,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path
