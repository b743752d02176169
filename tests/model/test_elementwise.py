"""What keeps less for backward gives the bits of the plain expressions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilrec_dist.model.elementwise import normed, rotate, swiglu

SHAPES = [(1, 1, 4), (3, 7, 24), (2, 50, 576)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def require_equal(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor):
    """The results and all gradients are equal bit for bit."""
    found = []
    for function in (ours, plain):
        copies = [one.detach().clone().requires_grad_(one.requires_grad) for one in inputs]
        result = function(*copies)
        result.backward(drawn(*result.shape, seed=9).detach())
        found.append([result, *(one.grad for one in copies if one.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    def plain(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    require_equal(swiglu, plain, drawn(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation(shape):
    batch, length, width = shape

    def plain(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin

    angles = drawn(1, length, 1, width, seed=1).detach()
    heads = drawn(batch, length, 3, width)
    require_equal(
        lambda heads, *rotary: rotate(heads, rotary), plain, heads, angles.cos(), angles.sin()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_the_stream_that_goes_on(shape):
    norm = nn.RMSNorm(shape[-1], eps=1e-5)
    hidden, weight = drawn(*shape), drawn(shape[-1], seed=2).detach()
    gradients = []
    for function in (normed, lambda norm, hidden: (norm(hidden), hidden)):
        norm.weight = nn.Parameter(weight.clone())
        stream_in = hidden.detach().clone().requires_grad_()
        rows, stream = function(norm, stream_in)
        (stream + rows.tanh()).backward(drawn(*shape, seed=9).detach())
        gradients.append((rows, stream, stream_in.grad, norm.weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
