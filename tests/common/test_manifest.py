"""Manifests: what was written is verified.

Every kind of damage is refused by name, and a file is hashed once.
"""

import json
import os

import pytest

from ilrec_dist.common import manifest
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.manifest import (
    hash_files,
    verified,
    verify,
    with_checksum,
    without_checksum,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "inner/b.txt").write_text("text")
    (tmp_path / ".progress.json").write_text("{}")
    write_manifest(tmp_path, {"version": 1})
    return tmp_path


def test_a_whole_folder_is_verified(folder):
    written = json.loads((folder / "manifest.json").read_text())
    assert written["version"] == 1 and sorted(written["files"]) == ["a.bin", "inner/b.txt"]
    assert written["files"]["a.bin"]["bytes"] == 256
    verify(folder)
    assert verified(folder, "inner/b.txt") == folder / "inner/b.txt"


def flip(path):
    """Flip one bit, as a disk would, but with the time of a later write."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (flip, "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_damage_is_refused_with_the_file_and_what_to_do(folder, damage, word):
    damage(folder / "a.bin")
    with pytest.raises(UserError, match=rf"a\.bin: {word}.*run it again"):
        verify(folder, repair="run it again")
    verified(folder, "inner/b.txt")


def test_a_file_that_the_manifest_does_not_have_is_refused(folder):
    (folder / "c.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.bin: manifest\.json has no hash of it"):
        verified(folder, "c.bin")


def test_a_file_is_hashed_once_until_it_changes(folder, monkeypatch):
    read = []
    true_hash = manifest.sha256_file
    monkeypatch.setattr(manifest, "sha256_file", lambda path: read.append(path) or true_hash(path))
    hash_files(folder)
    assert read == []
    flip(folder / "a.bin")
    hash_files(folder)
    hash_files(folder)
    assert [path.name for path in read] == ["a.bin"]


def test_an_object_without_its_own_checksum_is_not_whole():
    contents = {"step": 3}
    written = with_checksum(contents)
    assert without_checksum(written) == contents
    assert without_checksum(contents) is None
    assert without_checksum(written | {"step": 4}) is None
