"""Sums the loss operator's statistics of rows and turns them into the logged means.

METHOD.md §6 lists what is logged: each loss term, the
negatives, p(y), the KL divergence of each layer and the
coverage of the rewards; in total and by position in the item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from ilrec_kernels import RowStats

from ilrec_dist.objective.rows import GroupedRowStats


class LossStatistics:
    """fp64 sums over rows since the last report, by position in the item.

    `layers` are the numbers of the intermediate layers in the order
    L−1 … L−m, `weights` the weight of each loss term in the total.
    """

    def __init__(
        self,
        depth: int,
        layers: Sequence[int],
        weights: Mapping[str, float],
        device: torch.device,
    ) -> None:
        # Not copied: the weights of the last step count in the total.
        self.depth, self.weights = depth, weights
        # Logged as their mean over all rows, under these names.
        self._means = (
            *(f"loss/{term}" for term in weights),
            "p_target",
            "negatives/mean",
            "negatives/empty",
            "negatives/capped",
            *(f"kl/layer{layer}" for layer in layers),
        )
        self._columns = ("rows", *self._means, "valid_next", "covered", "coverable")
        self._sums = torch.zeros(depth, len(self._columns), dtype=torch.float64, device=device)
        self._tokens = self._num_words = 0
        # The sum of the cross-entropies of words.
        self._words = torch.zeros(1, dtype=torch.float64, device=device)

    def add(
        self,
        rows: RowStats | GroupedRowStats,
        num_tokens: int,
        grid_index: torch.Tensor | None = None,
    ) -> None:
        """Add a micro-batch of whole items, one after another.

        With grid_index int64 [N], ascending, row n is at position
        grid_index[n] % C of its item; without it all items have C tokens.
        """
        self._tokens += num_tokens
        if isinstance(rows, RowStats):
            self._add_items(rows, grid_index)
            return
        self._num_words += rows.words.numel()
        self._words += rows.words.sum(dtype=torch.float64)
        middle = rows.rewarded.cpo.numel()
        before, behind = (None, None) if grid_index is None else grid_index.tensor_split([middle])
        self._add_items(rows.rewarded, before)
        if rows.unrewarded is not None:
            self._add_items(rows.unrewarded, behind, have_rewards=False)

    def _add_items(
        self, rows: RowStats, grid_index: torch.Tensor | None, have_rewards: bool = True
    ) -> None:
        if rows.cpo.numel() == 0:
            return
        negatives = rows.num_negatives.to(torch.float32)
        columns = [
            torch.ones_like(negatives),
            *(rows.terms[term] for term in self.weights),
            rows.p_target,
            negatives,
            negatives == 0,
            rows.capped,
            *rows.kl,
            rows.valid_next_negatives,
            rows.covered,
            (negatives > 0) & have_rewards,
        ]
        table = torch.stack([column.to(torch.float32) for column in columns], dim=1)
        if grid_index is not None:
            # Items of several lengths: zeros stand behind the end of the shorter ones.
            first = int(grid_index[0]) // self.depth
            targets = int(grid_index[-1]) // self.depth + 1 - first
            grid = table.new_zeros(targets * self.depth, table.shape[1])
            grid[(grid_index - first * self.depth).to(table.device)] = table
            table = grid
        self._sums += table.view(-1, self.depth, table.shape[1]).sum(0, dtype=torch.float64)

    def is_finite(self, group: dist.ProcessGroup | None) -> bool:
        """Whether no sum is NaN or infinite on any rank; collective over the group."""
        sums = torch.cat([self._sums.flatten(), self._words])
        finite = torch.isfinite(sums).all().to(torch.int32)
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
        return bool(finite)

    def report(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """The means over all data-parallel ranks since the last report; starts anew.

        Keys are those of METHOD.md §6, with /pos0, /pos1, … for each position in the
        item, and `tokens`, `rows` and `loss/total`. The means are over item tokens;
        where rows are words, `rows` and `loss/total` count them too, and `rows/words`
        and `loss/words` are theirs. Collective over the group.
        """
        counts = torch.tensor(
            [self._tokens, self._num_words], dtype=torch.float64, device=self._sums.device
        )
        packed = torch.cat([self._sums.flatten(), self._words, counts])
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(packed, group=group)
        sums = packed[:-3].view_as(self._sums).cpu()
        words, tokens, num_words = packed[-3:].tolist()
        self._sums.zero_()
        self._words.zero_()
        self._tokens = self._num_words = 0
        report = {"tokens": tokens, "rows": float(sums[:, 0].sum())}
        for position in range(self.depth):
            report |= self._report_of(sums[position], f"/pos{position}")
        report |= self._report_of(sums.sum(0), "")
        report["loss/total"] = sum(
            weight * report[f"loss/{term}"] for term, weight in self.weights.items()
        )
        if num_words:
            items = report["rows"]
            report |= {"rows": items + num_words, "rows/words": num_words}
            report["loss/words"] = words / num_words
            report["loss/total"] = (items * report["loss/total"] + words) / report["rows"]
        return report

    def _report_of(self, sums: torch.Tensor, suffix: str) -> dict[str, float]:
        by_name = dict(zip(self._columns, sums.tolist(), strict=True))
        rows = max(by_name["rows"], 1.0)
        report = {name + suffix: by_name[name] / rows for name in self._means}
        report[f"negatives/valid_next{suffix}"] = _ratio(
            by_name["valid_next"], by_name["negatives/mean"]
        )
        report[f"rewards/coverage{suffix}"] = _ratio(by_name["covered"], by_name["coverable"])
        return report


def _ratio(part: float, whole: float) -> float:
    """NaN where the whole is nothing: the log
    writes null, and a curve skips the point.
    """
    return part / whole if whole else math.nan
