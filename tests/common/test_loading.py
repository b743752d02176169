"""Functions by name."""

import gc
import subprocess
import sys

from ilrec_dist.common.loading import load_function, uncollected_imports


def test_a_function_is_found_by_its_name():
    assert load_function("ilrec_dist.common.loading:load_function") is load_function


def test_nothing_is_collected_while_a_function_is_loaded_nor_looked_through_later(tmp_path):
    (tmp_path / "heavy.py").write_text(
        "import gc\nwas_enabled = gc.isenabled()\ndef answer():\n    return was_enabled\n"
    )
    words = (
        "import gc\n"
        "from ilrec_dist.common.loading import load_function\n"
        "assert load_function('heavy:answer')() is False\n"
        "assert gc.isenabled()\n"
        "frozen = gc.get_freeze_count()\n"
        "assert frozen > 1000\n"
        "load_function('heavy:answer')\n"
        "assert gc.get_freeze_count() <= frozen, 'nothing new was imported'\n"
    )
    subprocess.run([sys.executable, "-c", words], check=True, cwd=tmp_path)


def test_collections_that_are_off_stay_off():
    gc.disable()
    try:
        with uncollected_imports():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
