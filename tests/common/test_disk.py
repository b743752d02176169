"""A full disk is named whatever the library calls it (/dev/full is one)."""

from __future__ import annotations

import pytest
from safetensors import SafetensorError

from ilrec_dist.common.disk import not_writable
from ilrec_dist.common.errors import NotWritable
from ilrec_dist.common.files import atomic_file, committed_folder


def test_what_is_staged_on_a_full_disk_is_refused_by_its_own_name(tmp_path):
    for context, path in ((atomic_file, tmp_path / "file"), (committed_folder, tmp_path / "dir")):
        with (
            pytest.raises(NotWritable, match=f"{path}: No space left on device; make room"),
            context(path),
            open("/dev/full", "wb", buffering=0) as full,
        ):
            full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_a_block_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
        open(tmp_path / "missing")


def test_libraries_words_for_it_are_known(tmp_path):
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    found = not_writable(SafetensorError(words), tmp_path)
    assert str(found) == f"{tmp_path}: No space left on device; make room"
    # Why a write was cut short is found out by another, which succeeds here.
    assert not_writable(OSError("1048576 requested and 0 written"), tmp_path) is None
    assert not_writable(ValueError("the same as ever"), tmp_path) is None
