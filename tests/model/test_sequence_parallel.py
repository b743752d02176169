"""Sequence parallelism changes what a rank keeps, and neither rows nor gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.attention import PackedSequences
from ilrec_dist.model.branches import BranchedSequences
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.lora import LoraConfig, add_lora
from ilrec_dist.model.partial import separate_rows
from ilrec_dist.testing.accounting import saved_for_backward, storage_bytes
from ilrec_dist.testing.distributed import Mesh, run_distributed

pytestmark = pytest.mark.slow

SMALL = dict(num_layers=2, hidden_size=32, num_heads=4, init_std=0.2, dropout=0.0)
GPT2 = BackboneConfig(**SMALL, ffn_hidden_size=64)
LLAMA = BackboneConfig(
    **SMALL,
    ffn_hidden_size=48,
    num_kv_heads=2,
    normalization="RMSNorm",
    activation="swiglu",
    position_embedding="rope",
    bias=False,
    tie_embeddings=False,
)
QWEN3 = replace(LLAMA, qk_norm=True, qkv_bias=True, head_dim=16)
# Relative errors; a number of bf16 has 8 bits, and the ranks' sums are rounded on the way.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
VOCAB, POSITIONS = 45, 20
# Rows of the vocabulary that are parameters of their own, of two ranks.
ADDED = (20, 45)


@dataclass(frozen=True)
class Case:
    tp: int
    config: BackboneConfig
    # How the tokens come: padded, packed or branched. None of them is a multiple of tp.
    tokens: str = "padded"
    lora: bool = False
    trains_rows: bool = False
    recompute: bool = False
    precision: str = "fp32"


CASES = {
    "learned positions and biases": Case(2, GPT2),
    "learned positions, four ranks, packed": Case(4, GPT2, "packed"),
    "branched": Case(2, GPT2, "branched"),
    "rope": Case(2, LLAMA),
    "rope, packed, recomputed": Case(2, LLAMA, "packed", recompute=True),
    "head norms, two key/value heads of four ranks": Case(4, QWEN3),
    "head norms, one key/value head, packed": Case(2, replace(QWEN3, num_kv_heads=1), "packed"),
    "adapters": Case(2, replace(LLAMA, qk_norm=True), lora=True),
    "adapters and rows, four ranks, packed": Case(4, LLAMA, "packed", True, True),
    "rows beside all weights": Case(2, GPT2, trains_rows=True),
    "bf16": Case(2, LLAMA, precision="bf16"),
    "layer norms in bf16": Case(2, GPT2, precision="bf16"),
}


def built(case: Case) -> Backbone:
    """The model of a case, with its adapters drawn."""
    model = Backbone(case.config, VOCAB, POSITIONS, precision=case.precision, seed=3)
    model.recompute = case.recompute
    if case.lora:
        torch.manual_seed(5)
        for layer in add_lora(model, LoraConfig(rank=3, alpha=6.0), seed=3).linears():
            for part, module in layer.targeted():
                b = torch.randn(layer.shapes[part][0], 3).mul_(0.1)
                layer.parameter_b(module).data.copy_(layer.local_b(part, b))
    if case.trains_rows:
        model.base_sha256 = "drawn" if case.lora else None
        separate_rows(model, ADDED)
    return model


def step(model: Backbone, tokens: str) -> dict[str, torch.Tensor]:
    """The rows of two layers, all gradients, and the bytes kept for backward."""
    generator = torch.Generator().manual_seed(4)
    context = {}
    if tokens == "packed":
        lengths = [5, 1, 12, 2, 16, 7, 5, 3]
        context["packed"] = PackedSequences(lengths)
        shape = (1, sum(lengths))
    elif tokens == "branched":
        anchors = torch.tensor([[4, 8], [0, 6], [2, 2]])
        context["branches"] = BranchedSequences(9, anchors, 3, 11)
        shape = (3, 9 + 2 * 3)
    else:
        shape = (5, 11)
    ids = torch.randint(0, VOCAB, shape, generator=generator)
    rows = torch.randint(0, ids.numel(), (17,), generator=generator)
    model.zero_grad()
    with saved_for_backward(model.parameters()) as saved:
        out = model(ids, rows, 1, **context)
    kept = storage_bytes(saved)
    saved.clear()
    # Every rank has the whole gradient of the rows, as the loss operator gives it.
    weight = torch.linspace(-1, 1, model.config.hidden_size).to(out.final.dtype)
    loss = (out.final * weight).square().sum() + (out.layers[0] * weight.flip(0)).tanh().sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad} - UNUSED
    return {
        "kept": torch.tensor(kept),
        "final": out.final.detach(),
        "layer": out.layers[0].detach(),
        **gradients,
    }


# Of the loss alone.
UNUSED = {"gpt.output_layer.weight", "trained_rows.weights.head"}


def compared(mesh: Mesh, case: Case) -> dict[str, float]:
    """Relative errors by name, and the share of the kept bytes."""
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = built(case)
        plain = step(model, case.tokens)
        model.sequence_parallel = True
        cut = step(model, case.tokens)
        assert plain.keys() == cut.keys()
        share = float(cut.pop("kept") / plain.pop("kept"))
        floor = 1e-5 * max(float(value.norm()) for value in plain.values())
        errors = {
            name: float((cut[name] - plain[name]).norm() / (plain[name].norm() + floor))
            for name in plain
        }
        # What every rank holds whole stays equal to the last bit.
        whole = {
            name: cut[name].flatten()
            for name, parameter in model.named_parameters()
            if name in cut and not parameter.tensor_model_parallel
        }
        shared = torch.cat([cut["final"].flatten(), *whole.values()])
        others = [torch.empty_like(shared) for _ in range(mesh.tp)]
        torch.distributed.all_gather(others, shared, group=mesh.tp_group)
        assert all(torch.equal(shared, other) for other in others)
        # Validation works on whole batches.
        model.eval()
        lone = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([2])
        found = model(*lone).final
        model.sequence_parallel = False
        assert torch.equal(found, model(*lone).final)
        return errors | {"kept": share}
    finally:
        destroy_parallel()


@pytest.mark.parametrize("name", CASES)
def test_rows_and_gradients_are_those_of_whole_tokens(name: str) -> None:
    case = CASES[name]
    for errors in run_distributed(compared, case.tp, case.tp, case):
        share = errors.pop("kept")
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= TOLERANCES[case.precision], (worst, errors[worst])
        # What lies inside of attention and feed-forward was cut already.
        assert share < 0.9
