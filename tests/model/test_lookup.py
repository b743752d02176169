"""Gradients of embeddings in bf16, which are sums of as many as a batch has tokens."""

from __future__ import annotations

import pytest
import torch

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.attention import PackedSequences
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.lookup import looked_up
from ilrec_dist.model.partial import separate_rows
from ilrec_dist.testing.distributed import Mesh, run_distributed

CONFIG = BackboneConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    dropout=0.0,
    position_embedding="learned",
    tie_embeddings=False,
)
VOCAB, SEQUENCES, LENGTH = 12, 1500, 4
# One rounding to 8 bits.
ROUNDED_ONCE = 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_and_the_sums_of_their_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(7, 5).to(dtype).requires_grad_()
    # The first rows are used thousands of times.
    index = (7 * torch.rand(40, 500) ** 4).long()
    found = looked_up(table, index)
    assert torch.equal(found, table.detach()[index])
    assert looked_up(table, index[:, :0]).shape == (40, 0, 5)
    gradient = (torch.randn(*index.shape, 5) + 1).to(dtype)
    found.backward(gradient)
    expected = torch.zeros(7, 5, dtype=torch.float64)
    expected.index_add_(0, index.flatten(), gradient.flatten(0, 1).double())
    tolerance = 1e-5 if dtype == torch.float32 else ROUNDED_ONCE
    torch.testing.assert_close(table.grad.double(), expected, rtol=tolerance, atol=0.1)


def errors(mesh: Mesh, packed: bool, separate: bool, cut: bool) -> dict[str, float]:
    """Relative errors of the gradients of the words and
    positions, against fp64 sums over the tokens, which
    are cut over the ranks or not.
    """
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = Backbone(CONFIG, VOCAB, LENGTH, precision="bf16", seed=1)
        if separate:
            separate_rows(model, (8, VOCAB))
        reached: list[torch.Tensor] = []
        model.gpt.embedding.embedding_dropout.register_forward_hook(
            lambda _module, _inputs, output: output.register_hook(reached.append) and None
        )
        tokens = torch.tensor([2, 3, 2, 2]).repeat(SEQUENCES, 1)
        context = {}
        if packed:
            tokens = tokens.view(1, -1)
            context["packed"] = PackedSequences([LENGTH] * SEQUENCES)
        model.sequence_parallel = cut
        out = model(tokens, torch.arange(tokens.numel()), 1, **context)
        weight = torch.linspace(-1, 1, CONFIG.hidden_size, dtype=torch.bfloat16)
        (out.final * weight).square().sum().backward()
        (gradient,) = reached
        if cut:
            parts = [torch.empty_like(gradient) for _ in range(mesh.tp)]
            torch.distributed.all_gather(parts, gradient, group=mesh.tp_group)
            gradient = torch.cat(parts)
        words, positions = model.gpt.embedding.word_embeddings, model.gpt.embedding
        first, stop = words.vocab_start_index, words.vocab_end_index
        return {
            "words": error_of(words.weight, gradient, tokens, first, stop),
            "positions": error_of(
                positions.position_embeddings.weight,
                gradient,
                torch.arange(LENGTH).repeat(SEQUENCES),
                0,
                LENGTH,
            ),
        }
    finally:
        destroy_parallel()


def error_of(
    table: torch.Tensor, gradient: torch.Tensor, index: torch.Tensor, first: int, stop: int
) -> float:
    expected = torch.zeros(VOCAB + LENGTH, CONFIG.hidden_size, dtype=torch.float64)
    expected.index_add_(0, index.flatten(), gradient.view(-1, CONFIG.hidden_size).double())
    expected = expected[first:stop]
    found = table.grad[: len(expected)].double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tp", "cut"), [(1, False), (2, False), (2, True)])
def test_a_model_s_embeddings_in_bf16(tp: int, cut: bool, packed: bool, separate: bool) -> None:
    for found in run_distributed(errors, tp, tp, packed, separate, cut):
        assert found["words"] < ROUNDED_ONCE
        # The sums of two ranks are rounded, and so is their sum.
        assert found["positions"] < (2 if cut else 1) * ROUNDED_ONCE, found
