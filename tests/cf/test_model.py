"""SASRec: its loss against torch's, causality, and histories longer than the window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ilrec_dist.cf.sasrec import sharded_table as table
from ilrec_dist.cf.sasrec.fit import TrainingSequences, batches_by_length, sasrec_windows
from ilrec_dist.cf.sasrec.model import SASRec, encode, window_starts
from ilrec_dist.cf.sasrec.sharded_table import ItemShard, full_softmax_loss


def test_loss_and_gradients_equal_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several chunks, the last one short.
    monkeypatch.setattr(table, "LOGITS_PER_CHUNK", {"cpu": 7 * 11})
    monkeypatch.setattr(table, "MIN_ROWS_PER_CHUNK", 1)
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(17, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(11, 5, dtype=torch.float64, requires_grad=True),
    )
    targets = torch.randint(0, 11, (17,))
    (2 * full_softmax_loss(hidden, weight, targets)).backward()
    ours = (hidden.grad.clone(), weight.grad.clone())
    hidden.grad = weight.grad = None
    reference = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (2 * reference).backward()
    torch.testing.assert_close(full_softmax_loss(hidden, weight, targets), reference)
    torch.testing.assert_close(ours, (hidden.grad, weight.grad))
    loss = full_softmax_loss(hidden, weight, targets)
    loss.backward(retain_graph=True)
    # A second time is refused: the gradients are used up.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def sasrec() -> SASRec:
    torch.manual_seed(1)
    return SASRec(
        ItemShard(30), hidden_size=8, num_layers=2, num_heads=2, dropout=0.5, max_history=4
    )


def test_queries_see_their_own_history_only(sasrec: SASRec) -> None:
    rng = np.random.default_rng(2)
    items = rng.integers(0, 30, 40).astype(np.int32)
    starts, positions = np.array([0, 0, 0, 15, 15, 20]), np.array([1, 4, 13, 1, 5, 20])
    queries = encode(sasrec, items, starts, positions)
    for start, position, query in zip(starts, positions, queries, strict=True):
        begin = start + window_starts(np.array([position]), 4)[0]
        alone = torch.from_numpy(items[begin : start + position].astype(np.int64))[None]
        assert 1 <= alone.shape[1] <= 4 and (position <= 4 or alone.shape[1] >= 3)
        torch.testing.assert_close(query, sasrec.eval()(alone)[0, -1], atol=1e-6, rtol=1e-5)
    assert encode(sasrec, items, starts[:0], positions[:0]).shape == (0, 8)


def test_every_training_target_once_with_the_history_scoring_uses() -> None:
    # The last two of each are not training.
    lengths = np.array([3, 4, 2, 9, 17, 30])
    histories = TrainingSequences(
        np.arange(lengths.sum(), dtype=np.int32),
        np.cumsum(lengths) - lengths,
        np.maximum(lengths - 2, 0),
        lengths - 2,
    )
    begin, count, fresh = sasrec_windows(histories, 4)
    assert count.max() <= 4
    found = [
        (int(b + i + 1), int(b))
        for b, c, f in zip(begin, count, fresh, strict=True)
        for i in range(f, c)
    ]
    rows, positions = histories.training_targets(10**6)
    expected = histories.starts[rows] + positions
    assert sorted(target for target, _ in found) == sorted(expected.tolist())
    windows = dict(
        zip(
            expected.tolist(),
            (histories.starts[rows] + window_starts(positions, 4)).tolist(),
            strict=True,
        )
    )
    assert all(windows[target] == window for target, window in found)
    some = np.linspace(0, len(rows) - 1, 7).astype(int)
    for found_part, part in zip(
        histories.training_targets(7), (rows[some], positions[some]), strict=True
    ):
        assert np.array_equal(found_part, part)


def test_batches_hold_every_window_once_and_like_lengths_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    batches = batches_by_length(lengths, 16, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 5
