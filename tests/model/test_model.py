"""The backbone against itself: taps, tensor parallelism, packing, and decoding.

Decoding is compared with the full forward, and weights do not depend on tp.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.attention import PackedSequences
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.whole_model import full_state_dict

pytestmark = pytest.mark.slow

SMALL = dict(num_layers=3, hidden_size=32, num_heads=4, ffn_hidden_size=64, init_std=0.2)
GPT2 = BackboneConfig(**SMALL)
LLAMA = BackboneConfig(
    **SMALL,
    num_kv_heads=2,
    normalization="RMSNorm",
    activation="swiglu",
    position_embedding="rope",
    bias=False,
    tie_embeddings=False,
)
GPT2_GQA = BackboneConfig(**SMALL, num_kv_heads=2)
LLAMA_MHA = BackboneConfig(**SMALL, position_embedding="rope", activation="swiglu")
LLAMA_MQA = replace(LLAMA, num_kv_heads=1)
QWEN3 = replace(LLAMA, qk_norm=True, qkv_bias=True, head_dim=16)
QWEN3_MQA = replace(QWEN3, num_kv_heads=1)
VOCAB, POSITIONS = 45, 16


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (5, 12), generator=generator)
    rows = torch.tensor([3, 4, 5, 17, 30, 59])
    return tokens, rows


def step(mesh: Mesh, config: BackboneConfig) -> dict:
    """One forward and backward with dropout
    on: the loss and the gradients, unsharded.
    """
    initialize_parallel(mesh.tp, "cpu", seed=7)
    try:
        model = Backbone(config, VOCAB, POSITIONS, seed=3)
        tokens, rows = make_batch()
        out = model(tokens, rows, 2)
        weight = torch.linspace(-1, 1, config.hidden_size)
        loss = (out.final * weight).square().sum() + sum(
            layer.mul(weight).sum() for layer in out.layers
        )
        loss.backward()
        weights = full_state_dict(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )
        return {
            "loss": float(loss),
            "weights": weights,
            "gradients": full_state_dict(model),
            "range": model.vocab_range,
            "hidden": out.final.detach(),
        }
    finally:
        destroy_parallel()


@pytest.mark.parametrize(
    "config",
    [GPT2, LLAMA, LLAMA_MQA, QWEN3_MQA],
    ids=["gpt2", "llama", "one-kv-head", "qwen3-one-kv-head"],
)
def test_tp_agrees_with_one_process(config: BackboneConfig) -> None:
    (one,) = run_distributed(step, 1, 1, config)
    two = run_distributed(step, 2, 2, config)
    # The 45 tokens are padded to a multiple of 8.
    assert [rank["range"] for rank in two] == [(0, 24), (24, 48)]
    assert torch.equal(two[0]["hidden"], two[1]["hidden"])
    for rank in two:
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for name, weight in one["weights"].items():
            assert torch.equal(rank["weights"][name], weight), name
            expected = one["gradients"][name]
            assert (rank["gradients"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-6, (
                name
            )


def decode_error(mesh: Mesh, config: BackboneConfig, precision: str) -> float:
    """The largest difference of beams decoded with
    the cache from a full forward of their tokens.

    The beams' parents cross. Prefixes are equally long, or padded on the right.
    """
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = Backbone(config, VOCAB, POSITIONS, precision=precision, seed=3).eval()
        return max(
            decode_error_of(model, torch.tensor(lengths), ragged)
            for lengths, ragged in (([7, 7, 7], False), ([2, 7, 5], True))
        )
    finally:
        destroy_parallel()


def decode_error_of(model: Backbone, lengths: torch.Tensor, ragged: bool) -> float:
    generator = torch.Generator().manual_seed(2)
    users, prefix = len(lengths), int(lengths.max())
    tokens = torch.randint(0, VOCAB, (users, prefix), generator=generator)
    hidden, cache = model.prefill(tokens, lengths if ragged else None)
    rows = torch.arange(users) * prefix + lengths - 1
    worst = float((hidden - model(tokens, rows).final).abs().max())
    beams = torch.zeros(users, 1, 0, dtype=torch.int64)
    for t, width in enumerate((4, 4, 6, 2)):
        parents = torch.randint(0, beams.shape[1], (users, width), generator=generator)
        new = torch.randint(0, VOCAB, (users, width), generator=generator)
        hidden = model.decode(cache, new, None if t == 0 else parents)
        assert not hidden.requires_grad
        beams = torch.cat(
            (
                beams.gather(1, parents[:, :, None].expand(-1, -1, beams.shape[2])),
                new[:, :, None],
            ),
            dim=2,
        )
        for user, length in enumerate(lengths.tolist()):
            flat = torch.cat((tokens[user, :length].expand(width, -1), beams[user]), dim=1)
            rows = torch.arange(1, width + 1) * flat.shape[1] - 1
            with torch.no_grad():
                expected = model(flat, rows).final
            worst = max(worst, float((hidden[user] - expected).abs().max()))
    return worst


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "config",
    [GPT2, GPT2_GQA, LLAMA, LLAMA_MHA, LLAMA_MQA],
    ids=["learned-mha", "learned-gqa", "rope-gqa", "rope-mha", "rope-mqa"],
)
def test_decoding_equals_the_full_forward(config: BackboneConfig, tp: int) -> None:
    assert max(run_distributed(decode_error, tp, tp, config, "fp32")) < 1e-5


def test_decoding_in_bf16() -> None:
    # Hidden states are of size 1, with 8 bits of precision.
    assert max(run_distributed(decode_error, 1, 1, LLAMA, "bf16")) < 0.1


def packed_errors(mesh: Mesh, config: BackboneConfig) -> list[float]:
    """Errors of a packed row against its samples
    one by one: hidden states and gradients.
    """
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = Backbone(replace(config, dropout=0.0), VOCAB, POSITIONS, seed=3)
        generator = torch.Generator().manual_seed(4)
        lengths = [5, 1, 12, 2, 16, 7, 5, 3]
        samples = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
        weight = torch.linspace(-1, 1, config.hidden_size)

        def run(calls: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            model.zero_grad()
            hidden = torch.cat([torch.cat((out.final, *out.layers), 1) for out in calls])
            (hidden * weight.repeat(3)).square().sum().backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            return hidden.detach(), gradients

        one_by_one = [model(s[None], torch.arange(len(s)), 2) for s in samples]
        expected, expected_gradients = run(one_by_one)
        row = torch.cat(samples)
        packed = PackedSequences(lengths)
        got, gradients = run([model(row[None], torch.arange(len(row)), 2, packed)])
        errors = [float((got - expected).norm() / expected.norm())]
        for name, gradient in expected_gradients.items():
            errors.append(float((gradients[name] - gradient).norm() / (gradient.norm() + 1e-2)))
        return errors
    finally:
        destroy_parallel()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["learned", "rope"])
def test_a_packed_batch_equals_its_samples_one_by_one(config: BackboneConfig, tp: int) -> None:
    for errors in run_distributed(packed_errors, tp, tp, config):
        assert max(errors) <= 1e-5


def padding_errors(mesh: Mesh, config: BackboneConfig) -> tuple[int, list[float]]:
    """Layers' tokens with packing, and its errors against padded sequences."""
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = Backbone(replace(config, dropout=0.0), VOCAB, POSITIONS, seed=3)
        generator = torch.Generator().manual_seed(4)
        tokens = torch.randint(0, VOCAB, (4, 12), generator=generator)
        # Sequences whose last rows stand at different places, one without any row.
        rows = torch.tensor([3, 4, 5, 12 + 11, 24, 24 + 7])
        sizes, found = [], []
        model.gpt.decoder.layers[0].register_forward_hook(
            lambda _, inputs, output: sizes.append(output.shape[0] * output.shape[1])
        )
        for packs in (False, True):
            model.packs = packs
            model.zero_grad()
            out = model(tokens, rows, 1)
            weight = torch.linspace(-1, 1, config.hidden_size)
            (out.final * weight + out.layers[0] * weight.flip(0)).square().sum().backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append({"final": out.final.detach()} | gradients)
        assert sizes[0] == 48
        plain, packed = found
        return sizes[1], [
            float((packed[n] - plain[n]).norm() / (plain[n].norm() + 1e-2)) for n in plain
        ]
    finally:
        destroy_parallel()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["learned", "rope"])
def test_a_batch_without_its_padding_gives_the_same_rows_and_gradients(
    config: BackboneConfig, tp: int
) -> None:
    for tokens, errors in run_distributed(padding_errors, tp, tp, config):
        assert tokens == 6 + 12 + 8 + 1
        assert max(errors) <= 1e-5


@pytest.mark.parametrize("lengths", [[], [3, 0, 2]], ids=["none", "empty sample"])
def test_packed_sequences_without_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        PackedSequences(lengths)


def test_batches_of_packed_sequences_are_of_similar_length() -> None:
    lengths = [1, 40, 3, 2, 33, 17, 16, 1, 63]
    packed = PackedSequences(lengths)
    assert packed.positions.tolist() == [p for length in lengths for p in range(length)]
    assert sum(batch.numel() for batch in packed.batches) < 2 * sum(lengths)
    tokens = torch.cat([batch.flatten() for batch in packed.batches])
    assert torch.equal(tokens[packed.position_in_batches], torch.arange(sum(lengths)))


def taps_and_padding(mesh: Mesh) -> None:
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = Backbone(GPT2, VOCAB, POSITIONS, seed=3).eval()
        tokens, rows = make_batch()
        seen: list[torch.Tensor] = []
        for layer in model.gpt.decoder.layers:
            layer.register_forward_hook(lambda module, args, output: seen.append(output))
        out = model(tokens, rows, 2)
        norm = model.gpt.decoder.final_layernorm
        for mine, hooked in zip((out.final, *out.layers), reversed(seen), strict=True):
            assert torch.equal(mine, norm(hooked).flatten(0, 1)[rows])
        # Samples are padded on the right.
        longer = torch.cat((tokens, torch.zeros(5, 3, dtype=torch.long)), dim=1)
        again = model(longer, rows // 12 * 15 + rows % 12, 2)
        torch.testing.assert_close(again.final, out.final)
        assert model(tokens, rows[:0], 1).layers[0].shape == (0, 32)
    finally:
        destroy_parallel()


def test_taps_are_the_normed_residual_stream_and_padding_is_unseen() -> None:
    run_distributed(taps_and_padding, 1, 1)


def refusals(mesh: Mesh) -> list[str]:
    said = []

    def refused(call) -> None:
        with pytest.raises(UserError) as caught:
            call()
        said.append(str(caught.value))

    refused(lambda: initialize_parallel(3, "cpu"))
    initialize_parallel(mesh.tp, "cpu")
    try:
        refused(lambda: Backbone(BackboneConfig(num_heads=1, hidden_size=32), VOCAB, POSITIONS))
        model = Backbone(GPT2, VOCAB, POSITIONS)
        refused(lambda: model(torch.zeros(1, POSITIONS + 1, dtype=torch.long), torch.tensor([0])))
    finally:
        destroy_parallel()
    return said


def test_bad_input_is_named() -> None:
    said = run_distributed(refusals, 2, 2)[0]
    for message, words in zip(
        said,
        (
            ["tp 3", "world size 2"],
            ["tp 2", "1 attention heads"],
            ["17 tokens", "16 learned positions"],
        ),
        strict=True,
    ):
        assert all(word in message for word in words) and "\n" not in message, message
