"""The training steps of benchmarks/gpu.py, of tiny shapes on the CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gpu_benchmark_s_training_steps_run_beside_their_plan(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--json", str(path)])
    # They run in a process of their own; without a GPU, also where there is one.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.main()
    rows = {row["what"]: row for row in json.loads(path.read_text())["training_steps"]}
    assert list(rows) == [
        f"{kind}, {method}, torch"
        for kind in ("full", "lora+new_rows")
        for method in ("sft", "ilrec")
    ]
    for what, row in rows.items():
        # Four sequences of six items of three tokens, without the last.
        assert row["tokens_per_second"] == pytest.approx(4 * 17 / row["seconds"]), what
        assert 0 < row["loss_share"] < 1 and 0 < row["planned_tokens_per_second"], what
        # Both are shares of the same peak, of the same operations a token.
        ratio = row["mfu"] / row["planned_mfu"]
        assert ratio == pytest.approx(row["tokens_per_second"] / row["planned_tokens_per_second"])
        assert row["peak_memory"] is None and row["planned_memory"] > 0
    # What is frozen has no optimizer state.
    planned = {what: row["planned_memory"] for what, row in rows.items()}
    assert planned["lora+new_rows, sft, torch"] < planned["full, sft, torch"]
