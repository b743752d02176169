"""Functions by name."""

import gc
import sys

import pytest

from ilrec_dist.common.loading import load_function, uncollected_imports


def test_a_function_is_found_by_its_name():
    assert load_function("ilrec_dist.common.loading:load_function") is load_function


def test_nothing_is_collected_while_a_function_is_loaded(tmp_path, monkeypatch):
    lines = "import gc\nwas_enabled = gc.isenabled()\ndef answer():\n    return was_enabled\n"
    (tmp_path / "loaded_by_name.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    frozen = gc.get_freeze_count()
    assert load_function("loaded_by_name:answer")() is False
    del sys.modules["loaded_by_name"]
    # What becomes garbage later, a training's engine above all, can still be collected.
    assert gc.isenabled() and gc.get_freeze_count() <= frozen


@pytest.mark.parametrize("enabled", [True, False])
def test_collections_are_afterwards_as_they_were(enabled):
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ImportError), uncollected_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
