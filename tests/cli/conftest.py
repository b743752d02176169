"""A finished run that the tests of the commands share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ilrec_dist.cli.main import main
from tests.support.shop import config_of, write_shop


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shop and a finished run on it."""
    root = tmp_path_factory.mktemp("shop")
    write_shop(root / "shop", {}, index_too=True)
    assert main(["run", str(config_of(root))]) == 0
    return root


@pytest.fixture
def shop(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run with its data, to be changed."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.copytree(finished / "shop", tmp_path / "shop")
    config_of(tmp_path)
    return tmp_path
