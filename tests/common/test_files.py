"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.common.files import write_array


class Torn(np.ndarray):
    """An array that cannot be read to its end."""

    def tofile(self, *_):
        raise RuntimeError("torn")


def test_an_array_keeps_its_name_and_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.array"
    write_array(path, np.arange(5))
    with pytest.raises(RuntimeError, match="torn"):
        write_array(path, np.arange(7).view(Torn))
    assert np.load(path).tolist() == [0, 1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.array"]
