"""A step that is cut by a budget of tokens is the step (METHOD.md §6)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.items.catalogue import make_title_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.families import DECODER
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.micro_batches import within_budget
from ilrec_dist.samples.prefetch import micro_batch_plan
from ilrec_dist.samples.windows import StepOrder, training_windows

BACKBONE = BackboneConfig(
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    **DECODER,
    init_std=0.2,
)
ITEMS, PIECES, BATCH, BUDGET = 40, 9, 48, 96


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelState]:
    yield initialize_parallel(1, "cpu")
    destroy_parallel(process_group=True)


@given(
    st.lists(st.integers(1, 60), max_size=40).map(lambda sizes: np.array(sizes, np.int64)),
    st.integers(1, 100),
    st.booleans(),
)
def test_no_micro_batch_exceeds_the_budget_unless_one_sample_does(tokens, budget, packs) -> None:
    parts = within_budget(tokens, budget, packs)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
    for part in parts:
        own = tokens[part]
        used = int(own.sum()) if packs or not len(own) else len(own) * int(own.max())
        assert used <= budget or len(own) == 1
        assert len(own) or len(parts) == 1
    fitting = tokens[tokens <= budget]
    if packs and len(fitting):
        # Two micro-batches that would fit into one are not made.
        assert len(parts) - (tokens > budget).sum() <= 2 * -(-fitting.sum() // budget)


@pytest.fixture(scope="module")
def maker() -> BatchMaker:
    """Items of one to three tokens, and one to eight of them before the target."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, PIECES, (ITEMS, 3))
    codes[rng.random(ITEMS) < 0.4, 2] = -1
    codes[rng.random(ITEMS) < 0.2, 1:] = -1
    catalogue = make_title_catalogue(codes, [f"piece {p}" for p in range(PIECES)])
    offsets = np.cumsum([0, *rng.integers(4, 15, 40)])
    dataset = InteractionDataset(
        rng.integers(0, ITEMS, offsets[-1]).astype(np.int32),
        offsets,
        [str(u) for u in range(40)],
        [str(i) for i in range(ITEMS)],
    )
    return BatchMaker(dataset, catalogue, Trie(catalogue), training_windows(dataset, 8, "last"))


def test_the_tokens_of_samples_are_those_of_their_batch(maker) -> None:
    ids = np.random.default_rng(0).permutation(len(maker.windows))[:30]
    tokens = maker.num_tokens(ids)
    for number, count in zip(ids, tokens, strict=True):
        assert maker.make(np.array([number]), 1).num_tokens == count
    assert maker.make(ids, 1).num_tokens == tokens.sum()
    assert len(maker.num_tokens(ids[:0])) == 0


@pytest.mark.parametrize("method", ["sft", "ilrec"])
def test_gradients_are_those_of_the_step_in_one(layout, maker, method) -> None:
    config = ObjectiveConfig(crr_lambda=0.0)
    if method == "sft":
        config = ObjectiveConfig(cpo_beta=0.0, cpd_mu=0.0, crr_lambda=0.0)
    vocab = maker.catalogue.vocab_size
    backbone = Backbone(BACKBONE, vocab, 32, seed=1)
    module = CrossLayerObjective.build(backbone, config, maker.catalogue, layout).train()
    sizes: list[int] = []
    backbone.gpt.decoder.layers[0].register_forward_hook(
        lambda _, inputs, output: sizes.append(output.shape[0] * output.shape[1])
    )
    order = StepOrder(maker.samples, BATCH, 1, seed=3)
    found = []
    for budget in (None, BUDGET):
        sizes.clear()
        module.zero_grad()
        backbone.packs = budget is not None
        losses, tokens = 0.0, []
        for planned in micro_batch_plan(order, maker, 0, 1, 1, layout, budget):
            batch = maker.make(planned.sample_ids, planned.step_rows)
            inputs = batch.model_inputs(layout.device)
            output = module(*inputs, rewards=None, loss_scale=1 / batch.step_rows)
            output.loss.backward()
            losses += float(output.loss.detach())
            tokens.append(batch.num_tokens)
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        found.append((losses, gradients))
    assert len(sizes) > 3 and max(tokens) <= BUDGET
    # What goes through the layers is less than 2 % padding.
    assert sum(tokens) > 0.98 * sum(sizes)
    (whole, expected), (cut, gradients) = found
    assert cut == pytest.approx(whole, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
