"""`negatives_from: random`: as many negatives as
the ensemble finds, from anywhere in the lists.
"""

from dataclasses import replace

import pytest
import torch
from ilrec_kernels import cross_layer_loss

from tests.support.loss_cases import Case, make_case


def rows_of(case: Case, source: str, backend: str, seed: int = 0, **options):
    torch.manual_seed(seed)
    chosen = replace(case.options, negatives_from=source, backend=backend, **options)
    output = cross_layer_loss(
        case.hidden[0],
        case.hidden[1:],
        case.head,
        case.targets,
        case.lists,
        case.rewards,
        chosen,
    )
    return output.rows


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_there_are_as_many_negatives_and_all_are_candidates(backend):
    case = make_case(n=60, max_negatives=4)
    found, drawn = (rows_of(case, source, backend) for source in ("intermediate", "random"))
    assert torch.equal(drawn.num_negatives, found.num_negatives) and found.capped.any()
    assert torch.equal(drawn.capped, found.capped)
    assert torch.equal(drawn.valid_next_negatives, drawn.num_negatives)
    # Where a row has more candidates than negatives, most draws are others.
    others = case.lists.indptr.diff() - 1 > 2 * found.num_negatives
    some = others & (found.num_negatives > 0)
    assert (drawn.negatives_key != found.negatives_key)[some].float().mean() > 0.7
    again = rows_of(case, "random", backend)
    assert torch.equal(again.negatives_key, drawn.negatives_key)
    other = rows_of(case, "random", backend, seed=1)
    assert (other.negatives_key != drawn.negatives_key)[some].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_where_every_candidate_is_a_negative_the_loss_is_that_of_hard_ones(backend):
    case = make_case(max_negatives=128, negative_threshold=1e-30)
    hard, drawn = (rows_of(case, source, backend) for source in ("intermediate", "random"))
    assert torch.equal(hard.num_negatives, (case.lists.indptr.diff() - 1).to(hard.cpo.dtype))
    for name in ("cpo", "cpd", "crr", "negatives_key"):
        torch.testing.assert_close(getattr(drawn, name), getattr(hard, name))


def test_gradients_flow_as_with_hard_negatives():
    case = make_case(n=6, d=5, v=20, dtype=torch.float64, max_negatives=3)
    options = replace(case.options, negatives_from="random", backend="torch")

    def loss(final):
        torch.manual_seed(4)
        return cross_layer_loss(
            final,
            case.hidden[1:],
            case.head,
            case.targets,
            case.lists,
            case.rewards,
            replace(options, mu=0.0),
        ).loss

    final = case.hidden[0].requires_grad_()
    assert torch.autograd.gradcheck(loss, (final,), eps=1e-7, atol=1e-4)


def test_what_random_negatives_cannot_do_is_refused():
    case = make_case()
    with pytest.raises(ValueError, match="negatives_from: random.*got negative_scope 'all'"):
        replace(case.options, negatives_from="random", negative_scope="all")
    with pytest.raises(ValueError, match="negatives_from: random.*got triton"):
        replace(case.options, negatives_from="random", backend="triton")
