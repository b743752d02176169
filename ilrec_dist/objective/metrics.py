"""Sums the loss operator's per-row statistics by position in the item, and turns them into the logged means (METHOD.md §6)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from ilrec_kernels import RowStats

NAMES = (
    "rows",
    "loss/cpo",
    "loss/cpd",
    "loss/crr",
    "p_target",
    "negatives",
    "empty",
    "capped",
    "valid_next",
    "covered",
)


class StatisticsSum:
    """fp64 sums [C, names + m] over rows since the last read-out, by position in the item."""

    def __init__(self, depth: int, num_intermediate: int, layers: list[int], device: torch.device):
        self.depth, self.layers = depth, layers
        self.sums = torch.zeros(
            depth, len(NAMES) + num_intermediate, dtype=torch.float64, device=device
        )
        self.tokens = 0

    def add(self, rows: RowStats, tokens: int, slots: torch.Tensor | None = None) -> None:
        """Rows of whole items, one after another; with slots int64 [N], ascending, row n is at position slots[n] % C."""
        self.tokens += tokens
        if rows.cpo.numel() == 0:
            return
        negatives = rows.num_negatives.to(torch.float32)
        columns = [
            torch.ones_like(negatives),
            rows.cpo,
            rows.cpd,
            rows.crr,
            rows.p_target,
            negatives,
            (negatives == 0).float(),
            rows.capped.float(),
            rows.valid_next_negatives.float(),
            rows.covered.float(),
            *rows.kl[: len(self.layers)],
        ]
        table = torch.stack([column.to(torch.float32) for column in columns], dim=1)
        if slots is not None:  # titles are of many lengths: zeros behind their ends
            ragged, table = (
                table,
                table.new_zeros((int(slots[-1]) // self.depth + 1) * self.depth, table.shape[1]),
            )
            table[slots.to(table.device)] = ragged
        self.sums += table.view(-1, self.depth, table.shape[1]).sum(0, dtype=torch.float64)

    def read(
        self, group: dist.ProcessGroup | None, mu: float, crr_lambda: float
    ) -> dict[str, float]:
        """The means over all data-parallel ranks since the last call, then start anew. Every rank of the group must call."""
        packed = torch.cat(
            [
                self.sums.flatten(),
                torch.tensor([float(self.tokens)], dtype=torch.float64, device=self.sums.device),
            ]
        )
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(packed, group=group)
        sums = packed[:-1].view_as(self.sums).cpu()
        tokens = float(packed[-1])
        self.sums.zero_()
        self.tokens = 0
        values = {"tokens": tokens, "rows": float(sums[:, 0].sum())}
        for position in range(self.depth):
            values |= self._means(sums[position], f"/pos{position}")
        values |= self._means(sums.sum(0), "")
        values["loss/total"] = (
            values["loss/cpo"] + mu * values["loss/cpd"] + crr_lambda * values["loss/crr"]
        )
        return values

    def _means(self, sums: torch.Tensor, suffix: str) -> dict[str, float]:
        by_name = dict(zip(NAMES, sums.tolist(), strict=False))
        rows, with_negatives = max(by_name["rows"], 1.0), by_name["rows"] - by_name["empty"]
        means = {
            name + suffix: by_name[name] / rows
            for name in ("loss/cpo", "loss/cpd", "loss/crr", "p_target")
        }
        means |= {
            f"negatives/mean{suffix}": by_name["negatives"] / rows,
            f"negatives/empty{suffix}": by_name["empty"] / rows,
            f"negatives/capped{suffix}": by_name["capped"] / rows,
            f"negatives/valid_next{suffix}": _share(by_name["valid_next"], by_name["negatives"]),
            f"rewards/coverage{suffix}": _share(by_name["covered"], with_negatives),
        }
        return means | {
            f"kl/layer{layer}{suffix}": float(value) / rows
            for layer, value in zip(self.layers, sums[len(NAMES) :], strict=True)
        }


def _share(part: float, whole: float) -> float:
    """NaN of nothing: the log writes null, and a curve skips the point."""
    return part / whole if whole else math.nan
