"""The loss of prompts is that of their three
kinds of rows, with one N and one gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ilrec_kernels import TokenLists, cross_layer_loss
from torch.nn.functional import cross_entropy

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective, loss_options
from ilrec_dist.objective.rows import GroupedOutput

V, GROUPS, SCALE = 40, (6, 4, 5), 0.25
BACKBONE = BackboneConfig(num_layers=3, hidden_size=16, num_heads=2, dropout=0.0, init_std=0.3)
SFT = ObjectiveConfig(cpo_beta=0.0, cpd_mu=0.0, crr_lambda=0.0, softmax_scope="valid_next")
ILREC = ObjectiveConfig(crr_lambda=0.5, softmax_scope="valid_next")
ITEM_TOKENS = np.arange(20, 40)


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelState]:
    yield initialize_parallel(1, "cpu")
    destroy_parallel(process_group=True)


def objective(parallel: ParallelState, config: ObjectiveConfig) -> CrossLayerObjective:
    backbone = Backbone(BACKBONE, V, 12, seed=2)
    return CrossLayerObjective(backbone, config, 3, V, ITEM_TOKENS, parallel)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenLists, torch.Tensor]:
    """tokens, rows, targets, candidates of
    the item rows, rewards of the first group.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (3, 12), generator=generator)
    rows = torch.randperm(36, generator=generator)[: sum(GROUPS)].sort().values
    items, words = GROUPS[0] + GROUPS[1], GROUPS[2]
    picks = [torch.randperm(20, generator=generator)[:6].sort().values + 20 for _ in range(items)]
    targets = torch.stack([pick[2] for pick in picks])
    words_targets = torch.randint(0, V, (words,), generator=generator)
    lists = TokenLists(torch.arange(items + 1) * 6, torch.cat(picks))
    rewards = torch.rand(GROUPS[0] * 6, generator=generator)
    return tokens, rows, torch.cat([targets, words_targets]), lists, rewards


def grouped(module: CrossLayerObjective) -> GroupedOutput:
    tokens, rows, targets, lists, rewards = inputs()
    output = module(
        tokens,
        rows,
        targets,
        lists.indptr,
        lists.tokens,
        (*GROUPS, len(rewards)),
        rewards=rewards if module.needs_rewards else None,
        loss_scale=SCALE,
    )
    assert isinstance(output, GroupedOutput)
    return output


@pytest.mark.parametrize("config", [SFT, ILREC], ids=["sft", "ilrec"])
def test_each_kind_of_rows_has_its_own_loss(layout, config: ObjectiveConfig) -> None:
    module = objective(layout, config)
    output = grouped(module)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()

    tokens, rows, targets, lists, rewards = inputs()
    hidden = module.backbone(tokens, rows, module.num_intermediate)
    options, first = loss_options(config, V, ITEM_TOKENS), 0
    total = torch.zeros(())
    for group, own in ((0, options), (1, dataclasses.replace(options, crr_lambda=0.0))):
        part = slice(first, first + GROUPS[group])
        tokens_of = slice(first * 6, (first + GROUPS[group]) * 6)
        found = cross_layer_loss(
            hidden.final[part],
            [layer[part] for layer in hidden.layers],
            module.backbone.head_weight,
            targets[part],
            TokenLists(lists.indptr[: GROUPS[group] + 1], lists.tokens[tokens_of]),
            rewards if own.crr_lambda else None,
            own,
            loss_scale=SCALE,
        )
        total = total + found.loss
        first += GROUPS[group]
    logits = hidden.final[first:] @ module.backbone.head_weight[:V].T
    words = cross_entropy(logits, targets[first:], reduction="none")
    total = total + SCALE * words.sum()
    total.backward()

    assert output.loss.item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(output.rows.words, words.detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_statistics_keep_items_and_words_apart(layout) -> None:
    module = objective(layout, ILREC)
    output = grouped(module)
    rewarded, unrewarded = output.rows.rewarded, output.rows.unrewarded
    assert unrewarded is not None and not unrewarded.crr.any() and rewarded.crr.any()
    statistics = module.make_statistics(2)
    statistics.add(output.rows, num_tokens=36)
    report = statistics.report(None)
    items, words = GROUPS[0] + GROUPS[1], GROUPS[2]
    assert (report["rows"], report["rows/words"]) == (items + words, words)
    assert report["loss/total"] == pytest.approx(
        output.loss.item() / SCALE / (items + words), rel=1e-5
    )
    assert report["loss/words"] == pytest.approx(output.rows.words.mean().item())
    cpo = torch.cat([rewarded.cpo, unrewarded.cpo])
    for position in range(2):
        assert report[f"loss/cpo/pos{position}"] == pytest.approx(cpo[position::2].mean().item())
    # What has no rewards is not counted as uncovered.
    with_negatives = rewarded.num_negatives > 0
    expected = (rewarded.covered.sum() / with_negatives.sum()).item()
    assert report["rewards/coverage"] == pytest.approx(expected)
    # Nothing is left for the next report, and titles are told apart by their places in the grid.
    assert statistics.report(None)["rows"] == 0
    statistics = module.make_statistics(3)
    places = torch.tensor([0, 1, 3, 4, 5, 6, 9, 12, 13, 14])
    statistics.add(output.rows, 36, places)
    report = statistics.report(None)
    for position in range(3):
        expected = cpo[places % 3 == position].mean().item()
        assert report[f"loss/cpo/pos{position}"] == pytest.approx(expected)


def test_a_batch_without_words_or_without_histories(layout) -> None:
    module = objective(layout, ILREC)
    tokens, rows, targets, lists, rewards = inputs()
    n = GROUPS[0]
    for groups in ((n, 0, 0, n * 6), (0, n, 0, 0), (0, 0, n, 0)):
        words = groups[2] > 0
        output = module(
            tokens,
            rows[:n],
            targets[:n],
            lists.indptr[: 1 if words else n + 1],
            lists.tokens[: 0 if words else n * 6],
            groups,
            rewards=rewards if groups[0] else rewards[:0],
            loss_scale=SCALE,
        )
        output.loss.backward()
        assert output.loss.item() > 0 and module.backbone.head_weight.grad is not None
