"""What is proposed where a layout does not fit is accepted
and fits, and changes only what it must.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import load_config
from ilrec_dist.plan.hardware import Hardware
from ilrec_dist.plan.nearest import Proposal, nearest_fitting
from ilrec_dist.plan.plan import Plan, make_plan
from ilrec_dist.plan.workload import DataSizes
from tests.support.hf_shapes import LLAMA_8B, QWEN2_HALF_B, QWEN3_8B, write_shape

GIB = 2.0**30
SHAPES = {"llama": LLAMA_8B, "qwen3": QWEN3_8B, "qwen2": QWEN2_HALF_B}


class Asked:
    """A configuration of a model on stated hardware, as a command gives them."""

    def __init__(self, folder: Path, model: str, hardware: Hardware, *words: str) -> None:
        tree: dict[str, Any] = {
            "runs_dir": str(folder / "runs"),
            "data": {"format": "csv", "path": "data.csv"},
            "items": {"levels": 4},
            "backbone": {"from": write_shape(folder / model, SHAPES[model])},
            "train": {"batch_size": 256, "precision": "bf16"},
        }
        self.path, self.hardware, self.words = folder / "c.yaml", hardware, words
        self.path.write_text(yaml.safe_dump(tree))

    def plan(self, *appended: str, memory: float | None = None) -> Plan:
        """Raises UserError where the command would be refused."""
        words, nodes = list(appended), self.hardware.nodes
        if words[:1] == ["--nodes"]:
            nodes, words = int(words[1]), words[2:]
        gpus = Hardware(
            nodes,
            self.hardware.gpus_per_node,
            self.hardware.gpu_memory if memory is None else memory,
            *FAST,
        )
        settings = [*self.words, *words, f"launch.workers={gpus.gpus}"]
        return make_plan(load_config(self.path, settings), gpus, DataSizes())

    def nearest(self, memory: float | None = None) -> Proposal | None:
        return nearest_fitting(self.plan(memory=memory))

    def fits(self, *appended: str) -> bool:
        """Whether the command with these words is accepted and fits."""
        try:
            return self.plan(*appended).fits
        except UserError:
            return False


# Links of 400 Gb/s and 450 GB/s, products, peak, memory and disk.
FAST = (5e10, 4.5e11, 6e14, 9.9e14, 3.3e12, 2e9)


def gpus(nodes: int, per_node: int, gib: float) -> Hardware:
    return Hardware(nodes, per_node, gib * GIB, *FAST)


# An uneven vocabulary rules tensor parallelism out.
@pytest.mark.parametrize(("gib", "expected"), [(60, 2), (27, 3)])
def test_only_zero_fits(tmp_path, gib, expected):
    asked = Asked(tmp_path, "llama", gpus(4, 8, gib), "backbone.vocab_multiple=1")
    proposal = asked.nearest()
    assert proposal is not None and proposal.words == f"train.zero_stage={expected}"
    assert asked.fits(*proposal.words.split())
    assert asked.fits("train.zero_stage=2") == (expected == 2)
    # Nothing else on these nodes does.
    shorter = [f"train.accumulation_steps={steps}" for steps in (2, 4, 8)]
    for words in itertools.product(["train.recompute=false", "train.recompute=true"], shorter):
        assert not asked.fits(*words)


def test_only_sequence_parallelism_fits(tmp_path):
    """On one group whose micro-batches are of one sequence and recomputed already."""
    words = ["launch.tp=8", "train.recompute=true", "train.batch_size=8"]
    words += ["train.accumulation_steps=8", "train.max_history=5000", "evaluation.batch_size=1"]
    asked = Asked(tmp_path, "llama", gpus(1, 8, 30), *words)
    whole, cut = asked.plan().needed, asked.plan("launch.sequence_parallel=true").needed
    assert cut < whole
    asked.hardware = gpus(1, 8, (whole + cut) / 2 / GIB)
    proposal = asked.nearest()
    assert proposal is not None and proposal.words == "launch.sequence_parallel=true"
    assert asked.fits(*proposal.words.split())


def test_nothing_fits(tmp_path):
    assert Asked(tmp_path, "llama", gpus(1, 2, 2)).nearest() is None


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, "train.zero_stage=3"), (32, "train.recompute=true")]
)
def test_the_one_that_slows_the_step_least_is_nearest(tmp_path, steps, expected):
    """ZeRO 3 sums gradients and gathers weights at every micro-batch, between nodes
    here; in a step of one micro-batch it sends less than ZeRO 1.
    """
    # Micro-batches are of one sequence, and a node has one GPU.
    words = [f"train.batch_size={4 * steps}", f"train.accumulation_steps={steps}"]
    words += ["train.max_history=100"]
    asked = Asked(tmp_path, "qwen2", gpus(4, 1, 80), *words)
    ways = ("train.zero_stage=3", "train.recompute=true")
    memory = max(asked.plan(one).needed for one in ways)
    assert memory < asked.plan().needed
    proposal = asked.nearest(memory)
    assert proposal is not None and proposal.words == expected


def test_what_needs_several_processes_is_not_proposed_to_one(tmp_path):
    words = ["train.batch_size=1", "train.max_history=100"]
    asked = Asked(tmp_path, "qwen2", gpus(1, 1, 80), *words)
    for refused in ("train.zero_stage=2", "train.zero_stage=3", "launch.sequence_parallel=true"):
        with pytest.raises(UserError, match="has no effect here"):
            asked.plan(refused)
    proposal = asked.nearest(asked.plan("train.recompute=true").needed)
    assert proposal is not None and proposal.words == "train.recompute=true"


def test_the_smallest_of_equal_changes_is_nearest(tmp_path):
    asked = Asked(tmp_path, "llama", gpus(4, 8, 80), "launch.tp=4")
    needed = asked.plan("train.accumulation_steps=4").needed
    proposal = asked.nearest(needed)
    assert proposal is not None and proposal.words == "train.accumulation_steps=4"


def test_a_slowdown_far_below_a_percent_is_none(tmp_path):
    asked = Asked(tmp_path, "qwen3", gpus(1, 8, 80), "launch.tp=2", "train.precision=fp32")
    first, second = (
        asked.plan(one) for one in ("train.accumulation_steps=2", "train.zero_stage=2")
    )
    assert second.time.total < first.time.total < 1.001 * second.time.total
    memory = max(first.needed, second.needed)
    assert memory < asked.plan().needed
    proposal = asked.nearest(memory)
    assert proposal is not None and proposal.words == "train.accumulation_steps=2"


LAYOUTS = {
    "whole, 4 nodes": ("llama", (4, 8), ()),
    "whole, one node, tp": ("qwen3", (1, 8), ("launch.tp=2", "train.precision=fp32")),
    "one GPU": ("qwen2", (1, 1), ()),
    "adapters with dropout": (
        "llama",
        (1, 4),
        ("train.trainable=lora+new_rows", "train.lora.dropout=0.1", "train.max_history=400"),
    ),
    "heads that 4 does not divide": ("qwen2", (1, 8), ("train.max_history=100",)),
    "a budget of tokens": (
        "qwen3",
        (2, 4),
        ("train.micro_batch_tokens=4096", "train.max_history=100", "train.zero_stage=2"),
    ),
}


@pytest.mark.parametrize("share", [0.95, 0.8, 0.5, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_proposal_is_accepted_fits_and_has_no_needless_change(tmp_path, layout, share):
    model, (nodes, per_node), words = LAYOUTS[layout]
    asked = Asked(tmp_path, model, gpus(nodes, per_node, 80), *words)
    asked.hardware = gpus(nodes, per_node, share * asked.plan().needed / GIB)
    proposal = asked.nearest()
    assert proposal is not None
    applied = asked.plan(*proposal.words.split())
    assert applied.fits
    assert applied.needed == proposal.plan.needed and applied.time == proposal.plan.time
    nodes_words, keys = [], proposal.words.split()
    if keys[:1] == ["--nodes"]:
        nodes_words, keys = keys[:2], keys[2:]
        assert not asked.fits(*keys)
    for left_out in keys:
        assert not asked.fits(*nodes_words, *(key for key in keys if key != left_out))
