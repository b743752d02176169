"""The steps on which a study's estimate rests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.pipeline.timed_steps import STEPS, _time_training
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.tiny_run import losses_of, tiny_config


def timed(mesh: Mesh, tree: dict[str, Any], folder: str) -> dict[str, float] | None:
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        return _time_training(config_from_dict(tree), Path(folder), parallel)
    finally:
        destroy_parallel()


@pytest.mark.slow
def test_a_training_ends_after_the_steps_that_are_timed(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, train={"methods": ["sft"]})
    (times,) = run_distributed(timed, 1, 1, config_to_dict(config), str(tmp_path))
    assert times is not None
    assert len(losses_of(tmp_path)) == STEPS
