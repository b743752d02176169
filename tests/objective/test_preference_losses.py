"""Preference losses: the formulas of METHOD.md §11 in fp64, written out another way."""

import math

import numpy as np
import pytest
import torch

from ilrec_dist.objective.config import PreferenceConfig
from ilrec_dist.objective.preference import (
    DPO,
    PairScores,
    PreferenceLoss,
    SimPO,
    SmoothedDPO,
    SoftmaxDPO,
    pair_scores,
)

BETA, GAMMA = 0.7, 0.4


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dpo(y, n, ref_y, ref_n, length_y, length_n, flip):
    return -math.log(sigmoid(BETA * ((y - ref_y) - (n[0] - ref_n[0]))))


def softmax_dpo(y, n, ref_y, ref_n, length_y, length_n, flip):
    # The target's share in a softmax over the target and its negatives.
    rewards = [BETA * (y - ref_y), *(BETA * (a - b) for a, b in zip(n, ref_n, strict=True))]
    return -math.log(math.exp(rewards[0]) / sum(math.exp(r) for r in rewards))


def simpo(y, n, ref_y, ref_n, length_y, length_n, flip):
    return -math.log(sigmoid(BETA * y / length_y - BETA * n[0] / length_n[0] - GAMMA))


def smoothed(y, n, ref_y, ref_n, length_y, length_n, flip):
    preferred = sigmoid(BETA * ((y - ref_y) - (n[0] - ref_n[0])))
    return -(1 - flip) * math.log(preferred) - flip * math.log(1 - preferred)


LOSSES = [
    (DPO, 1, dpo),
    (SoftmaxDPO, 4, softmax_dpo),
    (SimPO, 1, simpo),
    (SmoothedDPO, 1, smoothed),
]


def scores(targets: int, negatives: int, seed: int = 3) -> PairScores:
    rng = np.random.default_rng(seed)
    log_pi = torch.tensor(-8 * rng.random(targets * (1 + negatives)), requires_grad=True)
    lengths = torch.tensor(rng.integers(1, 6, targets * (1 + negatives)).astype(float))
    known = torch.tensor(
        np.hstack([-8 * rng.random((targets, 1 + negatives)), rng.random((targets, 1))])
    )
    return pair_scores(log_pi, lengths, targets, negatives, known)


def loss_of(kind: type[PreferenceLoss]) -> PreferenceLoss:
    return kind(PreferenceConfig(beta=BETA, gamma=GAMMA))


@pytest.mark.parametrize(
    ("kind", "negatives", "formula"), LOSSES, ids=lambda x: getattr(x, "__name__", x)
)
def test_losses_are_their_formulas(kind, negatives, formula):
    given = scores(23, negatives)
    found = loss_of(kind)(given)
    fields = (
        given.target,
        given.negatives,
        given.reference_target,
        given.reference_negatives,
        given.target_length,
        given.negative_lengths,
        given.flip,
    )
    for row, value in enumerate(found.tolist()):
        assert value == pytest.approx(formula(*(f[row].tolist() for f in fields)), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "negatives", "_"), LOSSES, ids=lambda x: getattr(x, "__name__", x)
)
def test_gradients_are_those_of_the_losses(kind, negatives, _):
    given = scores(5, negatives)
    loss, known = (
        loss_of(kind),
        torch.cat(
            [given.reference_target[:, None], given.reference_negatives, given.flip[:, None]], dim=1
        ),
    )
    lengths = torch.cat([given.target_length, given.negative_lengths.flatten()])
    log_pi = torch.cat([given.target, given.negatives.flatten()]).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss(pair_scores(x, lengths, 5, negatives, known)), (log_pi,)
    )


def test_one_negative_of_the_softmax_loss_is_dpo():
    given = scores(9, 1)
    torch.testing.assert_close(loss_of(SoftmaxDPO)(given), loss_of(DPO)(given))


def test_losses_are_finite_where_a_continuation_is_all_but_impossible():
    log_pi = torch.tensor([-1e4, -1.0], requires_grad=True)
    for kind, *_ in LOSSES:
        value = loss_of(kind)(pair_scores(log_pi, torch.ones(2), 1, 1, torch.zeros(1, 3))).sum()
        value.backward()
        assert math.isfinite(value.item()) and log_pi.grad.isfinite().all()
