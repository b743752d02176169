"""Reductions over ragged rows: the form that GPUs take gives what the other gives."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ilrec_kernels.layout.segments import row_counts, segment_sum, set_key, sum_between_edges


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 99))
def test_sums_between_edges_are_segment_sums(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    n, counts = len(lengths), torch.tensor(lengths, dtype=torch.int64)
    row = torch.repeat_interleave(torch.arange(n), counts)
    assert row_counts(row, n).tolist() == lengths
    real = torch.randn(len(row), generator=g)
    torch.testing.assert_close(sum_between_edges(real, row, n), segment_sum(real, row, n))
    # The sums wrap around.
    whole = torch.randint(-(1 << 62), 1 << 62, (len(row),), generator=g)
    assert sum_between_edges(whole, row, n).tolist() == segment_sum(whole, row, n).tolist()


def test_a_set_has_one_key_whatever_is_left_out():
    row, token = torch.tensor([0, 0, 0, 2]), torch.tensor([7, 9, 11, 9])
    member = torch.tensor([True, False, True, False])
    assert (
        set_key(token, row, 3, member).tolist()
        == set_key(token[member], row[member], 3).tolist()
        != set_key(token, row, 3).tolist()
    )
