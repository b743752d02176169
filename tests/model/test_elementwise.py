"""What keeps less for backward gives the bits of the plain expressions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ilrec_dist.model.attention import CoreAttention
from ilrec_dist.model.elementwise import normed, remake_of, rotate, swiglu

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
        result.backward(drawn(*result.shape, seed=9).detach().to(result.dtype))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_the_stream_that_goes_on(shape, dtype):
    norm = nn.RMSNorm(shape[-1], eps=1e-5)
    hidden, weight = drawn(*shape).to(dtype), drawn(shape[-1], seed=2).detach().to(dtype)
    gradients = []
    for function in (normed, lambda norm, hidden: (norm(hidden), hidden)):
        norm.weight = nn.Parameter(weight.clone())
        stream_in = hidden.detach().clone().requires_grad_()
        rows, stream = function(norm, stream_in)
        (stream + rows.tanh()).backward(drawn(*shape, seed=9).detach().to(dtype))
        gradients.append((rows, stream, stream_in.grad, norm.weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_layer_norm_in_bf16_sums_its_gradients_in_fp32():
    norm = nn.LayerNorm(24).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(drawn(24, seed=1))
        norm.bias.copy_(drawn(24, seed=2))
    hidden = drawn(5, 1000, 24).detach().bfloat16()
    gradient = (drawn(5, 1000, 24, seed=3).detach() + 1).bfloat16()
    plain, ours = (hidden.clone().requires_grad_() for _ in range(2))
    expected = norm(plain)
    expected.backward(gradient)
    norm.zero_grad()
    found, _ = normed(norm, ours)
    found.backward(gradient)
    # The rows and the stream's gradient are torch's.
    assert torch.equal(found, expected) and torch.equal(ours.grad, plain.grad)
    exact = nn.LayerNorm(24).double()
    exact.load_state_dict(norm.state_dict())
    exact(hidden.double()).backward(gradient.double())
    for name in ("weight", "bias"):
        right = getattr(exact, name).grad
        assert (getattr(norm, name).grad - right).norm() < 2**-8 * right.norm()


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_layer_norm_in_bf16_with_one_frozen_parameter(trained):
    norm, hidden = nn.LayerNorm(24).bfloat16(), drawn(30, 24).detach().bfloat16()
    normed(norm, hidden)[0].sum().backward()
    expected = {name: parameter.grad for name, parameter in norm.named_parameters()}
    norm.zero_grad()
    for name, parameter in norm.named_parameters():
        parameter.requires_grad_(name == trained)
    normed(norm, hidden)[0].sum().backward()
    for name, parameter in norm.named_parameters():
        assert (parameter.grad is None) == (name != trained)
    assert torch.equal(getattr(norm, trained).grad, expected[trained])


def test_what_is_marked_is_made_again():
    norm, hidden = nn.RMSNorm(24, eps=1e-5), drawn(3, 24)
    for result in (normed(norm, hidden)[0], swiglu(hidden)):
        remake = remake_of(result)
        assert remake is not None
        function, source = remake
        assert torch.equal(function(source), result)
    # What needs no gradient is not kept anyway.
    assert remake_of(swiglu(hidden.detach())) is None
    assert remake_of(hidden) is None


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_is_that_of_copies_in_fp32(masked):
    core = CoreAttention(TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4), 1)
    query = drawn(2, 4, 9, 8).detach().bfloat16().requires_grad_()
    key, value = (drawn(2, 2, 9, 8, seed=s).detach().bfloat16().requires_grad_() for s in (1, 2))
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() if masked else None

    def plain(*heads: Tensor) -> Tensor:
        copies = (one.float() for one in heads)
        return F.scaled_dot_product_attention(
            *copies, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        ).bfloat16()

    kept: list[Tensor] = []

    def keep(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        core._attend(query, key, value, mask)
    assert all(one.dtype != torch.float32 for one in kept)
    require_equal(lambda *heads: core._attend(*heads, mask), plain, query, key, value)
