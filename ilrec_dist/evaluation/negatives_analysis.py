"""What the self-hard negatives of a trained model are, and what its loss terms push.

METHOD.md §§2-5, measured on a sample: the size of H, whether its members are plausible
for the user, whether they come back in the final beams, and the gradient of each term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from ilrec_kernels import TokenLists
from ilrec_kernels.reference import scopes, select_negatives
from torch import Tensor

from ilrec_dist.items.trie import Trie
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.samples.collate import Batch

# Items of the collaborative model that count as plausible.
PLAUSIBLE_ITEMS = 50
# Logits in memory at once.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Pairs:
    """Tokens of rows, as E pairs ascending by row."""

    row: np.ndarray  # int64 [E]
    token: np.ndarray  # int64 [E]


@torch.no_grad()
def negatives_of_rows(objective: CrossLayerObjective, batch: Batch) -> Pairs:
    """The members of H of each of the batch's
    rows, by the reference's own selection.
    """
    tokens, rows, targets, indptr, candidates = batch.model_inputs(objective.parallel.device)[:5]
    hidden = objective.backbone(tokens, rows, objective.num_intermediate)
    from_final = objective.options.negatives_from == "final"
    streams = [hidden.final] if from_final else hidden.layers
    weight = objective.backbone.head_weight[: objective.options.vocab_size].double()
    step = max(1, CHUNK_ELEMENTS // len(weight))
    negatives: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(targets), step):
        last = min(first + step, len(targets))
        low, high = int(indptr[first]), int(indptr[last])
        lists = TokenLists(indptr[first : last + 1] - low, candidates[low:high])
        scope = scopes(targets[first:last], lists, objective.options)
        ensemble = torch.stack([s[first:last].double() @ weight.T for s in streams]).mean(0)
        chosen, _ = select_negatives(ensemble, scope, objective.options)
        row, token = chosen.nonzero(as_tuple=True)
        negatives.append((row + first, token))
    rows_found, tokens_found = (torch.cat(parts) for parts in zip(*negatives, strict=True))
    return Pairs(rows_found.cpu().numpy(), tokens_found.cpu().numpy())


def is_below(trie: Trie, batch_items: np.ndarray, pairs: Pairs, lists: np.ndarray) -> np.ndarray:
    """bool [E]: whether an item of its target's
    list begins with a pair's prefix and token.

    batch_items: int64 [T] the targets, each with C rows; lists: int [T, K] items,
    padded with -1. The prefix of row t · C + p is the first p tokens of target t.
    """
    depth, catalogue = trie.depth, trie.catalogue
    target, position = np.divmod(pairs.row, depth)
    codes = catalogue.item_tokens(np.maximum(lists, 0))  # [T, K, C]
    target_codes = catalogue.item_tokens(batch_items)  # [T, C]
    # How many leading tokens each listed item shares with its target.
    shared = np.cumprod(codes == target_codes[:, None], axis=2).sum(axis=2)  # [T, K]
    at = np.take_along_axis(codes[target], position[:, None, None], axis=2)[..., 0]
    below = (shared[target] >= position[:, None]) & (at == pairs.token[:, None])
    result: np.ndarray = (below & (lists[target] >= 0)).any(axis=1)
    return result


def candidates_but_target(batch: Batch) -> Pairs:
    """Every candidate of every row except its target."""
    counts = batch.candidate_indptr.diff().numpy()
    row = np.repeat(np.arange(len(counts)), counts)
    token = batch.candidate_tokens.numpy()
    other = token != batch.targets.numpy()[row]
    return Pairs(row[other], token[other])


def term_gradients(
    objective: CrossLayerObjective, batch: Batch, rewards: Tensor | None, positions: int
) -> list[dict[str, float]]:
    """For all rows, then for those at each position
    in the item: the size of each gradient.

    `cross_entropy` is the norm of the gradient of the cross-entropy; `cpo`, `cpd` and
    `crr` are the norms of what their terms add to it, weighted as in the total loss and
    divided by it. The rows are a mean over the micro-batch. The objective's gradients
    are cleared.
    """
    full = objective.options
    nothing = dataclasses.replace(full, beta=0.0, mu=0.0, crr_lambda=0.0)
    variants = {
        "cpo": dataclasses.replace(nothing, beta=full.beta),
        "cpd": dataclasses.replace(nothing, mu=full.mu),
        "crr": dataclasses.replace(nothing, crr_lambda=full.crr_lambda),
    }
    results = []
    for position in (None, *range(positions)):
        inputs, values = _rows_at(objective, batch, rewards, position, positions)
        base = _gradient(objective, nothing, inputs, values)
        norm = float(base.norm())
        result = {"cross_entropy": norm}
        for name, options in variants.items():
            added = _gradient(objective, options, inputs, values) - base
            result[name] = float(added.norm()) / max(norm, 1e-30)
        results.append(result)
    objective.options = full
    return results


def _rows_at(
    objective: CrossLayerObjective,
    batch: Batch,
    rewards: Tensor | None,
    position: int | None,
    depth: int,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The model inputs of the rows at one position
    of their items, or of all, and rewards.
    """
    tokens, rows, targets, indptr, candidates = batch.model_inputs(objective.parallel.device)[:5]
    if position is None:
        return (tokens, rows, targets, indptr, candidates), rewards
    wanted = torch.arange(len(rows), device=rows.device) % depth == position
    counts = indptr.diff()
    entries = torch.repeat_interleave(wanted, counts)
    wanted_indptr = torch.cat([indptr[:1], counts[wanted].cumsum(0)])
    inputs = tokens, rows[wanted], targets[wanted], wanted_indptr, candidates[entries]
    return inputs, None if rewards is None else rewards[entries]


def _gradient(
    objective: CrossLayerObjective,
    options: object,
    inputs: tuple[Tensor, ...],
    rewards: Tensor | None,
) -> Tensor:
    objective.options = options  # type: ignore[assignment]
    objective.zero_grad(set_to_none=True)
    output = objective(*inputs, rewards=rewards, loss_scale=1.0 / len(inputs[1]))
    output.loss.backward()
    gradients = [
        parameter.grad.detach().float().flatten()
        for parameter in objective.backbone.parameters()
        if parameter.grad is not None
    ]
    objective.zero_grad(set_to_none=True)
    return torch.cat(gradients)


def without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    """NaN as JSON has it."""
    return {name: None if np.isnan(value) else value for name, value in values.items()}
