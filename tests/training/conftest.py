"""A tiny run with data, catalogue and CF models in place, for the tests that train."""

import pytest

from ilrec_dist.pipeline.execute import execute
from tests.support.tiny_run import tiny_config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """runs_dir of a run whose stages prepare, index and cf are done."""
    runs_dir = tmp_path_factory.mktemp("tiny")
    for stage in ("prepare", "index", "cf"):
        execute(tiny_config(runs_dir), stage)
    return runs_dir
