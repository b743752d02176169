"""The plan's parameters are those of the model
that is built, for every kind of decoder.
"""

from __future__ import annotations

import dataclasses

import pytest

from ilrec_dist.distributed.process_groups import initialize_parallel
from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.families import DECODER
from ilrec_dist.model.lora import add_lora
from ilrec_dist.model.partial import partial_state_dict, separate_rows
from ilrec_dist.plan.communication import StepLayout
from ilrec_dist.plan.decoder import DecoderSizes, summed
from ilrec_dist.plan.memory import weights_files
from ilrec_dist.plan.trained import TrainedParts, parameters
from ilrec_dist.testing.distributed import Mesh, run_distributed

pytestmark = pytest.mark.slow

GPT = BackboneConfig(num_layers=2, hidden_size=32, num_heads=4)
LLAMA = BackboneConfig(
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=48,
    **DECODER,
    tie_embeddings=False,
)
DECODERS = {
    "gpt": GPT,
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, num_kv_heads=1),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=24, tie_embeddings=True),
}
VOCAB, POSITIONS = 101, 19
# Added tokens that only the last of two ranks owns, and such that both have.
ADDED = (90, 101)
LORA = LoraConfig(rank=3)
ATTENTION = LoraConfig(rank=2, target_modules=["q_proj", "v_proj", "o_proj"])
TRAINED = {
    "adapters": TrainedParts(False, LORA),
    "adapters of the attention": TrainedParts(False, ATTENTION, ADDED),
    "adapters and rows": TrainedParts(False, LORA, (40, 101)),
    "rows": TrainedParts(False, None, ADDED),
    "rows apart from the rest": TrainedParts(True, None, ADDED),
}


def tensors(mesh: Mesh, config: BackboneConfig) -> list[tuple[int, int]]:
    """(dimensions, elements) of each parameter of this rank."""
    initialize_parallel(mesh.tp)
    backbone = Backbone(config, VOCAB, POSITIONS, initialize=False)
    return [(parameter.dim(), parameter.numel()) for parameter in backbone.parameters()]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("tp", [1, 2])
def test_parameters_are_exactly_those_of_the_model(name: str, tp: int) -> None:
    sizes = DecoderSizes.of(DECODERS[name], VOCAB, POSITIONS)
    planned = [(dimensions, count.per_rank(tp)) for _, dimensions, count in sizes.tensors()]
    for found in run_distributed(tensors, tp, tp, DECODERS[name]):
        assert planned == found
    total = sum(size for _, size in planned)
    assert summed(sizes.parameters().values()).per_rank(tp) == total


@dataclasses.dataclass(frozen=True)
class Tensors:
    """(dimensions, elements, whether it is trained) of each parameter of a rank, and
    the bytes of the tensors that it would store of a training's weights.
    """

    parameters: list[tuple[int, int, bool]]
    stored: int


def trained_tensors(mesh: Mesh, config: BackboneConfig) -> dict[str, Tensors]:
    """Those of this rank, by what is trained."""
    initialize_parallel(mesh.tp)
    found = {}
    for name, trained in TRAINED.items():
        backbone = Backbone(config, VOCAB, POSITIONS, initialize=False)
        if trained.lora is not None:
            add_lora(backbone, trained.lora)
        backbone.gpt.requires_grad_(trained.all_weights)
        backbone.added_rows = trained.rows or ADDED
        if trained.rows is not None:
            separate_rows(backbone, trained.rows)
        stored = partial_state_dict(backbone).values()
        found[name] = Tensors(
            [(p.dim(), p.numel(), p.requires_grad) for p in backbone.parameters()],
            sum(tensor.numel() * tensor.element_size() for tensor in stored),
        )
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tp", [1, 2])
def test_trained_parameters_are_exactly_those_of_the_model(name: str, tp: int) -> None:
    sizes = DecoderSizes.of(DECODERS[name], VOCAB, POSITIONS)
    ranks = run_distributed(trained_tensors, tp, tp, DECODERS[name])
    for what, trained in TRAINED.items():
        planned = parameters(sizes, trained, tp)
        for rank, tensors in enumerate(ranks):
            assert tensors[what].parameters == [
                (1 if one.group == "vector" else 2, one.ranks[rank], one.is_trained)
                for one in planned
            ], (what, rank)
        if not trained.all_weights:
            start, stop = trained.rows or ADDED
            total, _ = weights_files(sizes, StepLayout(tp, 1, 1, 4), trained, stop - start)
            assert ranks[0][what].stored == total, what


def test_a_published_model_has_the_number_of_its_card() -> None:
    llama = BackboneConfig(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        ffn_hidden_size=14336,
        **DECODER,
        tie_embeddings=False,
    )
    assert (
        summed(DecoderSizes.of(llama, 128_256, 131_072).parameters().values()).total
        == 8_030_261_248
    )
