"""Where the real data sets for tests lie, if they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(
    os.environ.get("ILREC_SHARED_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data"
)


def shared_data(name: str) -> Path:
    """The folder of a real data set; the test is skipped where it is absent."""
    folder = FOLDER / name
    if not folder.exists():
        pytest.skip(
            f"no {folder.resolve()}: set ILREC_SHARED_DATA to the folder that holds {name}/"
        )
    return folder
